"""A small file system of its own, to be filled. Needs root on Linux and e2fsprogs."""

import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

MIB = 16


class Disk:
    """A file system of `MIB`, mounted at `path` from a file, for as long as the context."""

    def __enter__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="ef21-soak-"))
        self.path = self._folder / "mounted"
        try:
            image = self._folder / "image"
            with image.open("wb") as file:
                file.truncate(MIB << 20)
            _run("mkfs.ext4", "-q", "-m", "0", image)
            self.path.mkdir()
            _run("mount", "-o", "loop", image, self.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.path.is_mount():
            _run("umount", self.path)
        shutil.rmtree(self._folder)

    def fill(self) -> None:
        """Leave no byte free."""
        with suppress(OSError), (self.path / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

    def free(self) -> None:
        """Take back what `fill` took."""
        (self.path / "ballast").unlink(missing_ok=True)


def requirements_missing() -> str | None:
    """Why none can be mounted here, in one line; None if it can."""
    try:
        with Disk():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"a file system in a file cannot be mounted: {' '.join(said.split())}"


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
