"""tests/support/check_links.py, on links that lead somewhere and on links that do not."""

import pytest
from check_links import complaints

PAGE = """\
# The page

## A `code` word, and *more*

## Twice
### Twice

A [link](#the-page), [another
one](other.md#of-the-other), a folder [here](sub/), a [file](sub/a%20file.txt),
[elsewhere](https://example.invalid/none.md#none), and a [mail](mailto:a@example.invalid).

| left | right |
| --- | --- |
| ![picture](sub/picture.png) | [code](#a-code-word-and-more), [second](#twice-1) |

`[no link](none.md)`

```md
[no link](none.md)
```
"""
BROKEN = [
    ("[gone](gone.md)", "gone.md is not in the repository"),
    ("![gone](sub/gone.png)", "sub/gone.png is not in the repository"),
    ("[outside](../outside.md)", "../outside.md is not in the repository"),
    ("[above](/other.md)", "/other.md is not in the repository"),
    ("[wrong](#nothing)", "#nothing names no heading"),
    ("[wrong](other.md#the-page)", "other.md#the-page names no heading"),
    ("[third](#twice-2)", "#twice-2 names no heading"),
    ("[gone][1]\n\n[1]: gone.md", "gone.md is not in the repository"),
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "outside.md").touch()
    for name, text in {
        "page.md": PAGE,
        "other.md": "Of the other\n---\n",
        "sub/a file.txt": "",
        "sub/picture.png": "",
        "sub/below.md": "[up](../page.md#twice)",
    }.items():
        (tmp_path / "root" / name).write_text(text)
    return tmp_path / "root"


def test_links_that_lead_somewhere(root):
    assert list(complaints(root, ["page.md", "other.md", "sub/below.md"])) == []


@pytest.mark.parametrize(("link", "complaint"), BROKEN)
def test_links_that_lead_nowhere(root, link, complaint):
    lines = PAGE.count("\n") + 2
    (root / "page.md").write_text(f"{PAGE}\n{link}\n")
    assert list(complaints(root, ["page.md"])) == [f"page.md:{lines}: {complaint}"]
