# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_ship
short_description: Ship what a host needs from the bundle on the controller
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Sends the blobs the host lacks, over whatever connection Ansible has to it, and has the host verify them by SHA-256
    before they get their names. What the host has already is neither sent nor read, on either side.
  - Over SSH and on the controller itself the blobs go in one stream to a process that runs on the host, as the user
    Ansible becomes, for as long as it is sent something. It needs Python 3.8 there and nothing else. It verifies blobs
    while they arrive, so that nothing is read again. Any other connection, and a become method that needs a terminal,
    gets files by the connection plugin, small ones together.
  - The stream has an SSH connection of its own, which does not compress and, where both processors compute AES, prefers
    ciphers made of it among those that the configuration of SSH allows. A connection that needs a password is shared.
  - A run that was cut goes on at the last byte that arrived when it is run again.
  - One controller at a time ships to a host; see O(wait).
  - The bundle is verified on the controller first, once for all hosts. A damaged blob is refused and named.
  - With the backend V(docker) the engine of the host is asked what it has of the images, by
    M(airgap.xinference.xinference_image). Of an image it has nothing is sent; of another one only the layers it lacks,
    and they are loaded at once and removed from the store. An engine that refuses such a part gets the whole image.
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Reports what would be sent. An artifact whose manifest the host does not have yet counts in full, although the
        host or its engine may have some of it.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  bundle:
    description:
      - The directory of the bundle on the controller. A relative path counts from where Ansible was started.
      - It may be on read-only media.
    type: str
    required: true
  root:
    description: The root directory on the host.
    type: str
    required: true
  models:
    description:
      - The model entries of the host, as in its inventory. Only their C(source), C(enabled) and C(allow_code) are used
        here. A model that brings code of its own is refused when its entry does not say C(allow_code=true).
      - Models of the bundle that the host has no entry for are not sent.
    type: list
    elements: dict
    default: []
  backend:
    description:
      - How the host serves. With V(native) the wheelhouse of the server is sent too.
    type: str
    choices: [docker, native]
    default: native
  images:
    description: The images the host needs, by their names in the engine. Used with the backend V(docker).
    type: list
    elements: str
    default: []
  tools:
    description:
      - Names of the tools of the bundle the host needs, such as a Compose plugin. They arrive, executable, below
        C(<root>/tools). Used with the backend V(docker).
    type: list
    elements: str
    default: []
  engines:
    description:
      - Where launches get packages of engines that the image lacks. With V(wheels) those of the bundle are sent, with
        V(bundle) if it has any. Used with the backend V(docker).
    type: str
    choices: [image, bundle, wheels, index]
    default: image
  docker_host:
    description:
      - Address of the engine, as seen from the host. By default what E(DOCKER_HOST) says there, else its socket.
    type: str
  signers:
    description:
      - Who may have signed the bundle, the text of an allowed signers file as L(ssh-keygen,
        https://man.openbsd.org/ssh-keygen#ALLOWED_SIGNERS) reads it, or the path of such a file on the controller. With
        it, a bundle that none of them signed is refused, before anything in it is looked at.
      - Needs C(ssh-keygen) of OpenSSH 8.2 or newer on the controller and the host, 8.8 or newer where keys have dates.
      - Empty means that nobody asks who made the bundle.
    type: str
    default: ""
  signers_on_host:
    description: Whether the host checks the signature for itself before it takes anything in. Else the controller only.
    type: bool
    default: true
  wait:
    description:
      - Seconds to wait while another controller is shipping to the host. Then the task fails and says who that is, and
        since when.
      - A controller that was killed or cut off is noticed within about a minute.
    type: int
    default: 120
  streams:
    description:
      - SSH connections that are opened to the host side by side, where one of them does not fill the link. Large blobs
        are spread over them.
      - Without effect on the controller itself and for connections that need a password.
    type: int
    default: 1
  rate_limit:
    description:
      - Bytes a second to send to this host at most, all its streams together, such as V(50M) (binary) or V(50MB)
        (decimal), V(16K) at least. Hosts that are shipped to at the same time have this much each.
      - Not kept by the connection plugin, where no stream can be had.
    type: str
  together:
    description:
      - Inventory names of hosts that are shipped to at the same time, this one among them, in the order in which they
        are. What one of them has, or is getting, the others take from it instead of the controller, as far as
        M(airgap.xinference.xinference_peer) runs there and each of them was asked with O(defer) what it lacks.
      - The role P(airgap.xinference.xinference_ship#role) does all three steps.
    type: list
    elements: str
    default: []
  defer:
    description:
      - Do all that can be done without sending anything. When something has to be sent, note down on the controller
        what it is, for the task with O(together) that follows, and return RV(waiting).
    type: bool
    default: false
  deep:
    description:
      - Has the host read everything again that it has of what it needs, from the disk and over all its processors,
        whatever the stamps say. What is damaged is removed, named, and sent anew in the same run, and nothing else is.
      - Directories that had a damaged file get the new one. A server that has the old file open keeps that until it is
        started again.
      - Images in the engine, and virtual environments, are not looked at. Neither is the bundle, except for what is
        sent to repair the host; see O(deep_bundle).
    type: bool
    default: false
  deep_bundle:
    description:
      - Reads what the hosts need of the bundle on the controller again, too, once for all hosts.
    type: bool
    default: false
  cache_dir:
    description:
      - The directory on the controller for the stamps that make a second verification of the bundle needless.
      - The default is beside the bundle, or a directory below C(~/.cache) when nothing can be written there.
    type: str
"""

EXAMPLES = r"""
- name: Ship the models of this host
  airgap.xinference.xinference_ship:
    bundle: /media/usb/bundle
    root: /opt/xinference
    models:
      - model_uid: bge-m3
        model_name: bge-m3
        model_type: embedding
        source:
          modelscope: BAAI/bge-m3
  register: shipped

- name: Ship and load the image a Docker host runs
  airgap.xinference.xinference_ship:
    bundle: /media/usb/bundle
    root: /opt/xinference
    backend: docker
    images: [xprobe/xinference:v4.1.0]
  environment:
    PYTHONPATH: /opt/xinference/lib/python  # where the docker library arrives
"""

RETURN = r"""
sent_bytes:
  description: Bytes of blobs that left the controller.
  returned: success
  type: int
  sample: 93323264
from_peers_bytes:
  description: Bytes of blobs that came from other hosts.
  returned: success, and not in check mode
  type: int
  sample: 0
peers:
  description: The hosts that gave this one blobs.
  returned: success, and not in check mode
  type: list
  elements: str
  sample: []
refused:
  description:
    - Why blobs came from the controller although other hosts were to give them. C(why) names the hosts, also one that
      gave wrong bytes; C(blobs) is how many there were.
  returned: success, and not in check mode
  type: list
  elements: dict
  sample: []
waiting:
  description: Whether something has to be sent that was not sent because of O(defer).
  returned: success, and not in check mode
  type: bool
  sample: false
skipped_bytes:
  description: Bytes of wanted blobs that were there already.
  returned: success
  type: int
  sample: 0
deduplicated_bytes:
  description: Bytes of files and layers that occur more than once in what the host needs, and travel once.
  returned: success
  type: int
  sample: 0
hashed_bytes:
  description: Bytes that were read to verify them, on the controller and on the host together.
  returned: success
  type: int
  sample: 186646528
blobs:
  description: Blobs that the host verified and took in.
  returned: success
  type: int
  sample: 14
seconds:
  description: Duration.
  returned: success
  type: float
  sample: 1.9
rate:
  description: Bytes sent a second, over the whole duration.
  returned: success
  type: int
  sample: 49117507
transports:
  description: How the blobs were sent, C(stream), C(put_file), or both when the first one failed.
  returned: success, and not in check mode
  type: list
  elements: str
  sample: [stream]
deep:
  description: What the host read again. In check mode, what it found, and what would be done about it.
  returned: with O(deep)
  type: dict
  contains:
    files:
      description: Files that were read.
      type: int
    read_bytes:
      description: Bytes that were read.
      type: int
    seconds:
      description: How long it took.
      type: float
    damaged:
      description: What was damaged; its C(digest), the C(files) that it is, and C(why) it was removed.
      type: list
      elements: dict
    faults:
      description: Files of directories that were others than they should be, some of them, and how.
      type: list
      elements: str
    made:
      description: Directories that were made again, or got new files.
      type: list
      elements: str
images:
  description: What was done about each image, as RV(airgap.xinference.xinference_image#module:images) says it.
  returned: success
  type: list
  elements: dict
  sample: []
artifacts:
  description: The content of C(<root>/state/artifacts.json), empty in check mode when something is missing.
  returned: success
  type: dict
  sample:
    models:
      bge-m3:
        path: /opt/xinference/models/bge-m3/6a1e2b0f7c5d
"""
