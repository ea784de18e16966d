"""Logs as they are read."""

import json

from logs import END, EVALS, RUN, TRAIN, write_log

from training.records import read_log


def test_log_is_sorted_into_its_records(tmp_path):
    log = read_log(write_log(tmp_path, RUN, EVALS[0], TRAIN, EVALS[1], END))
    assert (log.run, log.train, log.evals, log.end) == (RUN, [TRAIN], EVALS[:2], END)


def test_last_record_needs_no_newline(tmp_path):
    assert read_log(write_log(tmp_path, RUN, *EVALS, tail=json.dumps(END))).end == END
