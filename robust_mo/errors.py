"""The one exception for a user's mistake.

Programs print its message as a single line and exit with status 2; anything else that is raised is our bug and keeps
its traceback.  Every message is one sentence that names the file, field and value, and says what to do.
"""

import errno


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and what to do about it."""


class PromptError(InputError):
    """One prompt of several cannot be used: the message begins with its number, from 1 on."""


class InUse(InputError):
    """Another process is at it: nothing has failed."""


def first_line(error: Exception) -> str:
    """What an error of a library says in its first line, at most 300 characters; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def passes(error: OSError) -> bool:
    """Whether the same command may go on another time, as after a hiccup of a shared file system or a closed pipe:
    no bad input, whose exit status is 2."""
    kinds = ConnectionError | TimeoutError  # BrokenPipeError too
    return isinstance(error, kinds) or error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def unreached(error: Exception) -> bool:
    """Whether a bucket's library says that it has not come there."""
    return type(error).__module__.startswith(("aiohttp.", "gcsfs.", "google.auth.", "requests."))


def said(error: OSError) -> str:
    """What an OSError says, with the file where it knows one."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
