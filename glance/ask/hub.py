"""Why does the hub not give a file? Each cause has a line that says what to do; the libraries tell several alike.

They raise anew what the hub's client raised, so the first cause is looked for behind an error.
"""

import os

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def causes(error: BaseException | None) -> list[BaseException]:
    """Return the error and all that it was raised for or while handling, the newest first."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def refusal(error: Exception, path: str, revision: str | None = None) -> str | None:
    """Return why the hub gave nothing of the repository `path`, or of a part of it, ID/PART, in one line.

    None where it is not the hub's doing, as for a folder, or where the repository is there and lacks a file.
    """
    if os.path.isdir(path) or path.count("/") > 1 and os.path.isdir(os.path.dirname(path)):
        return None
    errors, page = causes(error), f"{constants.ENDPOINT}/{'/'.join(path.split('/')[:2])}"

    def found(*kinds) -> BaseException | None:
        return next((error for error in errors if isinstance(error, kinds)), None)

    if found(GatedRepoError):
        then = "with the account of this login, which has none yet" if get_token() else f"then {LOG_IN}"
        return f"it is gated: ask for access at {page}, {then}"
    if found(RepositoryNotFoundError):
        hidden = "not readable by this login; check the name" if get_token() else f"private; check the name, {LOG_IN}"
        return f"neither a folder here nor a repository on the hub, or {hidden}"
    if found(RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}; see {page}/commits/main, and give another --revision"
    if found(OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") and found(LocalEntryNotFoundError):
        at = f" at --revision {revision}" if revision else ""
        return f"neither a folder here nor in the cache{at}, and HF_HUB_OFFLINE forbids downloads; unset it"
    answer = found(HfHubHTTPError)
    if answer is not None and answer.response.status_code == 401:
        return "the hub knows no such token; mend HF_TOKEN or log in again with `hf auth login`"
    if answer is not None and not isinstance(answer, EntryNotFoundError):
        return f"the hub answers {answer.response.status_code}; try again later"
    if found(LocalEntryNotFoundError):
        return f"neither a folder here nor in the cache, and {constants.ENDPOINT} is out of reach; check the network"
    return None
