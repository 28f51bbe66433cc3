"""Data sets of the hub: pinned to a commit, read through `datasets`, kept as one Parquet file.

What a store records of such a source is the commit, not the bytes of the file: another version of `datasets` may write
them otherwise, and the rows are the same.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote

from shared.config import HubConfig
from shared.errors import UserError
from shared.files import replacing, sha256_of_json
from shared.score_store import HubSource

_COMMIT = re.compile(r"[0-9a-f]{40}")


def require_datasets() -> None:
    """Refuse where the library is not installed.

    Raises:
        UserError: it is not; names the extra.
    """
    from importlib.util import find_spec

    if find_spec("datasets") is None:
        raise UserError("data.hub.id needs the library `datasets`: install the extra, pip install -e '.[hub]'")


def pin(config: HubConfig, recorded: HubSource | None) -> HubSource:
    """The data set at a commit: that of `data.hub.revision`; where none is given, that which a store was begun with.

    Args:
        recorded: what the store that is gone on with was made from.

    Raises:
        UserError: the hub knows no such data set or revision.
    """
    assert config.id is not None
    require_datasets()
    revision = config.revision
    if revision is None and recorded is not None and recorded.id == config.id:
        revision = recorded.revision
    if revision is None or not _COMMIT.fullmatch(revision):
        revision = _commit(config.id, revision)
    return HubSource(id=config.id, config=config.config, split=config.split, revision=revision)


def fetch(source: HubSource) -> Path:
    """The rows of a pinned data set as a local Parquet file, made where it is not there yet.

    Raises:
        UserError: there is no such config or split, or the hub cannot be reached.
    """
    require_datasets()
    path = (
        _cache_folder() / f"{quote(f'{source.id} {source.config} {source.split} {source.revision}', safe=' ')}.parquet"
    )
    if path.is_file():
        return path
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        rows = datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, DatasetsError) as error:
        raise UserError(f"data.hub: {source}: {_first_line(error)}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        rows.to_parquet(temporary)
    return path


def content_of(source: HubSource) -> str:
    """What stands for the sha256 of the file: the commit is a hash of its content."""
    return sha256_of_json(source.model_dump(mode="json"))


def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise UserError(
            f"data.hub.id={name}{at}: the hub gives no such data set ({_first_line(error)}); without a network give "
            "the commit itself as data.hub.revision, and the data set is taken from the cache"
        ) from None
    assert commit is not None
    return commit


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prift" / "hub"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
