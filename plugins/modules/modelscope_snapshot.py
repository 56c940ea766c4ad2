#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fetch a model from ModelScope into a directory, resumable and checked."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: modelscope_snapshot
short_description: Fetch a model from ModelScope
version_added: "0.1.0"
description:
  - Makes the directory O(path) hold the files of a model at one revision, and nothing else, with ModelScope's own
    client.
  - A download that was cut is resumed, also by a later run. Every file is checked against the SHA-256 that the hub
    lists for it. A file that is damaged on disk is found and fetched again.
  - A second run fetches nothing and reads no file that has not changed, which is known from size, modification time
    and inode. When O(revision) is a commit id it does not even ask the hub.
options:
  model:
    description: Model on the hub, as C(organisation/name).
    type: str
    required: true
  path:
    description:
      - Directory that the files are put into. A directory with files of other origin is refused.
    type: path
    required: true
  revision:
    description:
      - Branch, tag or commit id of 40 hex digits. A branch is resolved to the commit it stands at, where the hub tells,
        and RV(revision) returns it.
    type: str
    default: master
  allow_patterns:
    description: Glob patterns of the files to fetch. All files when empty. C(*) also matches C(/).
    type: list
    elements: str
    default: []
  ignore_patterns:
    description: Glob patterns of files not to fetch, after O(allow_patterns).
    type: list
    elements: str
    default: []
  endpoint:
    description:
      - Address of the hub. When not given, the client decides, which honours E(MODELSCOPE_ENDPOINT).
    type: str
  token:
    description:
      - Access token for models that are not public. When not given, the client uses E(MODELSCOPE_API_TOKEN) or the
        login that was saved on this machine.
    type: str
  cache_dir:
    description:
      - Directory of what is remembered between runs. Give the one of M(airgap.xinference.xinference_bundle), and the
        files fetched here are not hashed again there.
      - Defaults to O(path) with C(.cache) appended.
    type: path
  attempts:
    description: How often each file is tried, on top of the client's own repetitions of single requests.
    type: int
    default: 3
  workers:
    description: Number of files fetched at the same time.
    type: int
    default: 4
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details: Asks the hub for the list of files and hashes nothing, so damage that left the size alone is not seen.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - modelscope-hub >= 0.4.6 (comes with modelscope >= 1.38) on the host that runs the module
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Fetch the weights of a chat model, pinned
  airgap.xinference.modelscope_snapshot:
    model: Qwen/Qwen2.5-7B-Instruct
    revision: a09a35458c702b33eeacc393d103063234e8bc28
    path: /srv/models/Qwen2.5-7B-Instruct
    ignore_patterns: ["*.onnx", "original/"]
"""

RETURN = r"""
directory:
  description: The directory.
  returned: success
  type: str
revision:
  description:
    - The pinned revision. A commit id where the hub gives one, otherwise the revision asked for and a digest over the
      hub's list of files.
  returned: success
  type: str
  sample: a09a35458c702b33eeacc393d103063234e8bc28
files:
  description: Number of files of the model.
  returned: success
  type: int
size:
  description: Bytes of all files together.
  returned: success
  type: int
size_text:
  description: The same for people.
  returned: success
  type: str
  sample: 14.2 GiB
fetched:
  description: Files that were fetched, or would be in check mode.
  returned: success
  type: list
  elements: str
fetched_bytes:
  description: Bytes of these files. Less went over the wire where a download was resumed.
  returned: success
  type: int
fetched_text:
  description: The same for people.
  returned: success
  type: str
damaged:
  description: Files among them that were there but not as the hub lists them.
  returned: success
  type: list
  elements: str
removed:
  description: Files that were removed because the revision or the patterns no longer have them.
  returned: success
  type: list
  elements: str
unchecked:
  description: Files for which the hub lists no SHA-256, so that only their size was checked.
  returned: success
  type: list
  elements: str
hashed_bytes:
  description: Bytes of files on disk that had to be hashed.
  returned: success
  type: int
problems:
  description: Everything that went wrong, by file.
  returned: failure
  type: list
  elements: str
"""

import os
import traceback
from pathlib import Path
from typing import Callable

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError, cache_dir
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.lock import locked
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.snapshot import (
    Comparison,
    HubFile,
    Record,
    Snapshot,
    Wish,
    carry_out,
    compare,
    resolve,
)

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars have no terminal here
HAS_CLIENT = True
IMPORT_ERROR = None
try:
    from modelscope_hub import HubApi
    from modelscope_hub.errors import HubError
except ImportError:
    HAS_CLIENT = False
    IMPORT_ERROR = traceback.format_exc()


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "model": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "revision": {"type": "str", "default": "master"},
            "allow_patterns": {"type": "list", "elements": "str", "default": []},
            "ignore_patterns": {"type": "list", "elements": "str", "default": []},
            "endpoint": {"type": "str"},
            "token": {"type": "str", "no_log": True},
            "cache_dir": {"type": "path"},
            "attempts": {"type": "int", "default": 3},
            "workers": {"type": "int", "default": 4},
        },
        supports_check_mode=True,
    )
    if not HAS_CLIENT:
        module.fail_json(msg=missing_required_lib("modelscope"), exception=IMPORT_ERROR)
    params = module.params
    directory = Path(params["path"])
    cache = Path(params["cache_dir"] or cache_dir(directory))
    wish = Wish(params["model"], params["revision"], tuple(params["allow_patterns"]), tuple(params["ignore_patterns"]))
    with failing(module, BundleError, OSError):
        try:
            if module.check_mode:
                result = _run(module, wish, directory, cache)
            else:
                with locked(cache / "snapshots" / "lock", "another download into this cache is running"):
                    result = _run(module, wish, directory, cache)
        except HubError as error:
            where = params["endpoint"] or "the hub"
            raise BundleError(f"{wish.model} at revision {wish.revision}: {where} says: {error}") from error
    module.exit_json(directory=params["path"], **result)


def _run(module: AnsibleModule, wish: Wish, directory: Path, cache: Path) -> dict:
    """Compare, fetch unless in check mode, and return the result."""
    params = module.params
    stamps = Stamps(cache / "stamps.json")
    record = Record(cache, directory)
    hub = None
    snapshot = record.complete(wish)
    if snapshot is None:
        hub = _hub(params, wish)
        snapshot = resolve(hub, wish)
    todo = compare(directory, snapshot, record.files, stamps, hashing=not module.check_mode)
    if not module.check_mode:
        try:
            if todo.fetch or todo.remove:
                hub = hub or _hub(params, wish)
                record.write(snapshot, complete=False)
                downloads = _downloader(hub, snapshot, directory, cache)
                carry_out(directory, snapshot, todo, stamps, downloads, params["attempts"], params["workers"])
            record.write(snapshot, complete=True)
        finally:
            stamps.save()
    return _result(snapshot, todo, stamps)


def _hub(params: dict, wish: Wish) -> HubApi:
    """The client, at the endpoint asked for or at the one it finds the model at."""
    hub = HubApi(endpoint=params["endpoint"], token=params["token"])
    if not params["endpoint"]:
        hub = HubApi(endpoint=hub.resolve_endpoint_for_read(wish.model), token=params["token"])
    return hub


def _downloader(hub: HubApi, snapshot: Snapshot, directory: Path, cache: Path) -> Callable[[HubFile], None]:
    """A function that fetches one file and checks it."""

    def download(file: HubFile) -> None:
        hub.download_file(
            snapshot.wish.model,
            "model",
            file.path,
            revision=snapshot.fetch_revision,
            local_dir=directory,
            cache_dir=cache / "modelscope-client",
            expected_sha256=file.digest.partition(":")[2] or None,
            file_size=file.size,
        )

    return download


def _result(snapshot: Snapshot, todo: Comparison, stamps: Stamps) -> dict:
    """The module's return values."""
    fetched = sum(file.size for file in todo.fetch)
    return {
        "changed": bool(todo.fetch or todo.remove),
        "revision": snapshot.revision,
        "files": len(snapshot.files),
        "size": snapshot.size,
        "size_text": size_text(snapshot.size),
        "fetched": [file.path for file in todo.fetch],
        "fetched_bytes": fetched,
        "fetched_text": size_text(fetched),
        "damaged": todo.damaged,
        "removed": todo.remove,
        "unchecked": [file.path for file in snapshot.files if not file.digest],
        "hashed_bytes": stamps.hashed_bytes,
        "diff": {
            "before": "".join(f"{path}\n" for path in [*todo.remove, *(f"{path} (damaged)" for path in todo.damaged)]),
            "after": "".join(f"{file.path} {size_text(file.size)}\n" for file in todo.fetch),
        },
    }


if __name__ == "__main__":
    main()
