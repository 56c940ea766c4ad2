# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of known failures of Xinference and its engines, for `diagnose`.

A row is data: name, pattern, cause, cure. Causes and cures are templates over the named groups of the pattern; where
the advice is a sum, a function adds more names. Rows stand from the particular to the general, and the first that
matches counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Callable, Dict, Match, Optional, Pattern, Tuple

from .fields import nearest

Names = Dict[str, str]
TOKEN_BLOCK = 256
CARDS_GIB = (24, 48, 80)


@dataclass(frozen=True)
class Row:
    """One known failure. `more` computes further names for the templates from the match.

    `heals` is whether it may pass without anybody doing something, so that the same launch is worth another try soon.
    """

    name: str
    pattern: Pattern[str]
    cause: str
    cure: str
    more: Optional[Callable[[Match[str]], Names]] = None
    heals: bool = False


# What a launch fails with where there is too little memory beside what runs already: it may succeed when that is gone.
NO_ROOM = ("kv-cache-tokens", "kv-cache-memory", "kv-cache-none", "gpu-memory-taken", "gpu-memory-out", "process-died")
# The same, and where no GPU has a place for one model more.
NO_PLACE = (*NO_ROOM, "gpu-slots")


def _cache_tokens(match: Match[str]) -> Names:
    """The room there is, rounded down to whole blocks of tokens; and how many times too small it is."""
    room, wanted = int(match.group("room")), int(match.group("wanted"))
    fits = room // TOKEN_BLOCK * TOKEN_BLOCK or room
    return {"fits": str(fits), "times": f"{wanted / max(room, 1):.1f}"}


def _cache_gib(match: Match[str]) -> Names:
    """What is missing in GiB, and what that is as a share of common cards."""
    missing = float(match.group("needed")) - float(match.group("free"))
    shares = [f"{math.ceil(missing / card * 100) / 100:.2f} on a {card} GiB card" for card in CARDS_GIB]
    room = match.group("room")
    fits = f"at most {int(room) // TOKEN_BLOCK * TOKEN_BLOCK or room}" if room else "less"
    return {"missing": f"{missing:.2f}", "shares": ", ".join(shares), "fits": fits}


def _share(match: Match[str]) -> Names:
    """The largest gpu_memory_utilization that what is free allows, rounded down to a percent."""
    share = math.floor(float(match.group("free")) / float(match.group("total")) * 100) / 100
    return {"share": f"{share:.2f}"}


def _nearest_names(match: Match[str]) -> Names:
    """The names that the server offers and that look most like the one asked for."""
    known = re.findall(r"'([^']+)'", match.group("known"))
    near = nearest(match.group("model"), known)
    return {"near": f"the nearest: {', '.join(near)}" if near else f"one of its {len(known)}: {', '.join(known)}"}


def _visible(match: Match[str]) -> Names:
    seen = match.group("seen").strip()
    if seen:
        return {"advice": f"Choose gpus among those it was given; it numbers them {seen}."}
    return {
        "advice": "It sees none: look at `nvidia-smi` where it runs, at the GPUs reserved for it (xinference_gpus), "
        "and whether its torch is a CUDA build."
    }


def _row(
    name: str,
    pattern: str,
    cause: str,
    cure: str,
    more: Optional[Callable[[Match[str]], Names]] = None,
    heals: bool = False,
) -> Row:
    return Row(name, re.compile(pattern, re.IGNORECASE | re.DOTALL), cause, cure, more, heals)


ROWS: Tuple[Row, ...] = (
    # -- GPU memory: vLLM, torch
    _row(
        "kv-cache-tokens",
        r"max seq len \((?P<wanted>\d+)\) is larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<room>\d+)\)",
        "vLLM must keep {wanted} tokens in its KV cache, and beside the weights there is room for {room}: {times} "
        "times too little.",
        "Set max_model_len to {fits} or less under options. Or make room: raise gpu_memory_utilization (0.95 at most, "
        "if nothing else uses the GPU), take a smaller quantization, or more GPUs.",
        _cache_tokens,
    ),
    _row(
        "kv-cache-memory",
        r"max seq len \((?P<wanted>\d+)\),? \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger than the "
        r"available KV cache memory \((?P<free>[\d.]+) GiB\)(?:.{0,80}?maximum model length is (?P<room>\d+))?",
        "vLLM needs {needed} GiB of KV cache for {wanted} tokens, and beside the weights {free} GiB are left.",
        "Set max_model_len to {fits} under options, or find {missing} GiB more: gpu_memory_utilization higher by "
        "{shares}.",
        _cache_gib,
    ),
    _row(
        "kv-cache-none",
        r"No available memory for the cache blocks",
        "The weights alone fill the share of GPU memory that vLLM may use; nothing is left for its KV cache.",
        "Raise gpu_memory_utilization under options, take a smaller quantization, or spread the model over more GPUs.",
    ),
    _row(
        "gpu-memory-taken",
        r"Free memory on device(?: (?P<device>\S+))? \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less "
        r"than desired GPU memory utilization \((?P<asked>[\d.]+), (?P<needed>[\d.]+) GiB\)",
        "vLLM wants to reserve {asked} of the GPU ({needed} GiB), and only {free} of {total} GiB are free: other "
        "models or programs hold the rest.",
        "Set gpu_memory_utilization to {share} or less under options if the model fits into that, move the model to "
        "another GPU, end what `nvidia-smi` shows, or use the transformers engine.",
        _share,
    ),
    _row(
        "gpu-memory-out",
        r"(?:CUDA|HIP) out of memory\. Tried to allocate (?P<wanted>[\d.]+ [KMG]iB).{0,60}?total capac?ity of "
        r"(?P<total>[\d.]+ [KMG]iB) of which (?P<free>[\d.]+ [KMG]iB) is free",
        "The GPU is full: {wanted} more were needed, {free} of {total} were free.",
        "Move the model to another GPU, take a smaller model or quantization, or give the others on it less "
        "(gpu_memory_utilization for vLLM, batch_size for embedding and rerank).",
    ),
    _row(
        "gpu-memory-out",
        r"out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "The memory of the GPU or of the host is used up.",
        "Move the model to another GPU, take a smaller model or quantization, or give the others on it less "
        "(gpu_memory_utilization for vLLM, batch_size for embedding and rerank).",
    ),
    _row(
        "process-died",
        r"Remote server \S* ?closed",
        "The process of the model died. Nearly always it ran out of memory, on the GPU or on the host, and was killed.",
        "Look at `dmesg` for the OOM killer and at `nvidia-smi`; then a smaller model or quantization, a smaller "
        "batch_size, or another GPU. Limit relaunches with XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT.",
    ),
    # -- GPUs
    _row(
        "gpu-not-visible",
        r"cannot use the GPUs with these indexes: \[(?P<asked>[^\]]*)\].*?"
        r"can only see these GPUs: \[(?P<seen>[^\]]*)\]",
        "The model was put on GPU {asked} of the server, which does not have it.",
        "{advice}",
        _visible,
    ),
    _row(
        "gpu-count",
        r"`n_gpu` must be greater than 0 and not greater than the number of GPUs: (?P<count>\d+)",
        "More GPUs were asked for than the {count} that the server sees.",
        "Lower n_gpu or leave it out; without GPUs the model runs on the CPU. If the host has more, see "
        "xinference_gpus.",
    ),
    _row(
        "gpu-slots",
        r"No available slot found for the model|No worker has capacity for",
        "Every GPU of the server already has a model, and it does not share one unasked.",
        "Say where the model goes with gpus; models can share a GPU only then.",
    ),
    _row(
        "gpu-busy",
        r"CUDA-capable device\(s\) is/are busy or unavailable",
        "The GPU did not take one more process: another one is just ending there, or has the GPU for itself.",
        "Run again in a minute. If that does not help, look at `nvidia-smi -q -d COMPUTE`: in the mode "
        "Exclusive_Process a GPU takes one model only.",
        heals=True,
    ),
    _row(
        "gpu-lost",
        r"Failed to initialize NVML: Unknown Error|NVML Unknown Error",
        "The container lost its GPUs. That happens when systemd reloads its units while the container runs.",
        "Recreate the container (not only restart it), and give it the device nodes explicitly so that it keeps them.",
    ),
    _row(
        "gpu-driver-old",
        r"NVIDIA driver on your system is too old|driver version is insufficient for CUDA runtime",
        "The NVIDIA driver of the host is older than the CUDA of this Xinference needs.",
        "Update the driver (580 or later for the images of Xinference 3 and 4), or take an older image.",
    ),
    _row(
        "gpu-unsupported",
        r"no kernel image is available for execution|device kernel image is invalid",
        "The engine was not built for this kind of GPU.",
        "Use another engine, or an image or wheels built for the GPU's compute capability.",
    ),
    # -- names, types, engines
    _row(
        "unknown-name",
        r"\w+ model (?P<model>\S+) not found, available ?model(?:s| list)?: dict_keys\(\[(?P<known>[^\]]*)\]?",
        "This version of Xinference knows no model {model}.",
        "Set model_name to {near}; or register a custom model of that name.",
        _nearest_names,
    ),
    _row(
        "unknown-llm",
        r"Model not found, name: (?P<model>[^,]+), format: (?P<format>[^,]+), size: (?P<size>[^,]+), "
        r"quantization: (?P<quantization>[^\s,]+)",
        "This version of Xinference has no model {model}, or not in format {format}, size {size}, quantization "
        "{quantization}.",
        "Compare model_name, model_format, model_size_in_billions and quantization with what "
        "GET /v1/model_registrations/LLM/{model} lists; or register a custom model.",
    ),
    _row(
        "not-serving",
        r"Model not found in the model list, uid: (?P<uid>\S+?)(?:[.\s]|$)",
        "Nothing serves under {uid}: it was never launched, or its launch failed and the server put it away.",
        "Launch it and look at the reason given then; the server keeps none in this message.",
    ),
    _row(
        "already-serving",
        r"Model is already in the model list, uid: (?P<uid>\S+)",
        "A model already runs or starts under {uid}.",
        "Terminate it first, or launch under another model_uid.",
    ),
    _row(
        "engine-not-usable",
        r"Model (?P<model>\S+) cannot be run on engine (?P<engine>\S+?)\.?(?:\s|$)",
        "{engine} is not installed where the server runs, or does not know this model, format or quantization.",
        "GET /v1/engines/<type>/{model} tells the reason for each engine; take one that is usable there, or add the "
        "packages of {engine} to the bundle.",
    ),
    _row(
        "engine-missing",
        r"Please specify the `model_engine` field",
        "A model of type LLM cannot be launched without model_engine.",
        "Set model_engine, e.g. transformers or vllm.",
    ),
    _row(
        "unknown-type",
        r"Unsupported model type:? '?(?P<type>[\w-]+)",
        "Xinference has no model type {type}.",
        "Set model_type to LLM, embedding, rerank, audio, image, video or flexible.",
    ),
    _row(
        "bad-uid",
        r"The model UID is invalid",
        "The server does not take this model_uid.",
        "Use 1 to 100 characters without a slash, not ending in -rep and a number.",
    ),
    _row(
        "definition-fields",
        r"validation errors? for Custom\w+\s+(?P<field>\S.*?)\s+"
        r"(?P<reason>field required|unexpected value|value is not)",
        "The definition of the custom model does not fit this version of Xinference: {field}: {reason}.",
        "Compare it with GET /v1/model_registrations/<type>/<name> of a built-in model of the same type.",
    ),
    _row(
        "worker-unknown",
        r"Worker ip address (?P<address>\S+) is not in the cluster",
        "No worker with the address {address} has joined this server.",
        "Set worker_ip to an address that /v1/workers shows, or leave it out.",
        heals=True,
    ),
    _row(
        "no-worker",
        r"No available worker found",
        "No worker has joined the server; one that has just been started joins within seconds.",
        "Run again in a minute. If that does not help, look at the end of the server's log for why its worker ended.",
        heals=True,
    ),
    _row(
        "rendezvous-port",
        r"(?:TCPStore|server socket has failed|DistNetworkError|init_process_group).{0,400}?"
        r"(?:address already in use|EADDRINUSE|Errno 98)",
        "The engine chose a port for its own processes that another program had taken a moment before.",
        "Run again; it chooses another one.",
        heals=True,
    ),
    _row(
        "store-locked",
        r"database is locked",
        "The server could not write its own database at that moment, because another of its processes was writing.",
        "Run again. If that does not help, look whether XINFERENCE_HOME lies on a network disk.",
        heals=True,
    ),
    # -- files
    _row(
        "path-missing",
        r"`model_path`: (?P<path>\S+) File or directory does not exist",
        "The server finds nothing at {path}. In a container the path counts as the container sees it.",
        "Ship the model, and let the inventory name its source instead of a model_path.",
    ),
    _row(
        "not-this-model",
        r"Unrecognized model in (?P<path>\S+?)\. Should have a `model_type` key|(?:no file named|Error no file)[^.]*"
        r"(?:model\.safetensors|pytorch_model\.bin)|does not appear to have a file named config\.json",
        "The model directory is not complete, or holds something else than the engine expects.",
        "Compare the directory with the bundle (digests), and model_format and model_engine with what it holds.",
    ),
    _row(
        "disk-full",
        r"No space left on device",
        "A disk of the server is full.",
        "Make room under the root directory and XINFERENCE_HOME.",
    ),
    _row(
        "read-only",
        r"Read-only file system: ['\"](?P<path>[^'\"]+)",
        "The server wants to write {path}, which is read-only.",
        "Let it: natively with xinference_server_writable; in a container with xinference_server_mounts (or "
        "xinference_server_read_only: false).",
    ),
    _row(
        "no-permission",
        r"PermissionError|Permission denied",
        "The server may not read or write a file it needs.",
        "Look at owner and mode, and with SELinux at the label (`ls -Z`; mounts need :z), of the path in the message.",
    ),
    # -- no network
    _row(
        "companion-download",
        r"(?:download|connect|offline|not registered|404|resolve)[^\n]{0,400}"
        r"(?P<name>fsmn-vad|ct-punc|cam\+\+|Qwen3-ForcedAligner)|"
        r"(?P<name2>fsmn-vad|ct-punc|cam\+\+|Qwen3-ForcedAligner)[^\n]{0,200}(?:is not registered|download)",
        "The model wants a companion model ({name}{name2}) that it fetches by itself, and there is no network.",
        "Put the companion into the bundle and give its path under options: vad_model, punc_model, spk_model or "
        "forced_aligner.",
    ),
    _row(
        "download-failed",
        r"Failed to download model '(?P<model>[^']+)'",
        "The server tried to fetch {model} from a model hub, which an air-gapped host cannot reach.",
        "Give the entry a source so that the model comes with the bundle, or the model_path where it lies on the host.",
    ),
    _row(
        "packages-install",
        r"uv pip install|uv', 'pip', 'install'.*returned non-zero|No solution found when resolving dependencies|"
        r"Failed to fetch: `https?://|"
        r"Could not find a version that satisfies the requirement",
        "The server tried to install Python packages for the model, and where it looks for them not all are.",
        "Leave xinference_engines at image (XINFERENCE_ENABLE_VIRTUAL_ENV=0), so that models run in the server's own "
        "environment; or carry the packages with everything they need in xinference_bundle_engine_requirements. The "
        "server's log names the first that is missing.",
    ),
    _row(
        "cubins",
        r"edge\.urm\.nvidia\.com|flashinfer\.ai",
        "FlashInfer tried to fetch compiled GPU code at first use.",
        "Add flashinfer-cubin and flashinfer-jit-cache of exactly its version to the bundle, or set "
        "FLASHINFER_CUBIN_DIR.",
    ),
    _row(
        "server-down",
        r"Max retries exceeded with url: /(?:v1|status|token)\b|No Xinference answers at",
        "No server answers there.",
        "Start it with playbooks/serve.yml (playbooks/site.yml does everything), then run again.",
    ),
    _row(
        "hub-offline",
        r"couldn't connect to 'https?://|outgoing traffic has been disabled|LocalEntryNotFoundError|"
        r"Max retries exceeded with url: (?!/(?:v1|status|token)\b)|"
        r"cannot find the requested files in the (?:disk|local) cache",
        "Something of the model is not in its directory, and the engine tried to fetch it from the network.",
        "Find the name of the file or model in the message and add it to the bundle.",
    ),
    # -- libraries
    _row(
        "tiktoken",
        r"No module named 'tiktoken'|cl100k_base",
        "A client sent token numbers instead of text (LangChain does), and the server needs tiktoken and its "
        "vocabulary to turn them back.",
        "Let the client send text (LangChain: check_embedding_ctx_length=False); or add tiktoken to the bundle and set "
        "TIKTOKEN_CACHE_DIR.",
    ),
    _row(
        "ffmpeg",
        r"ffmpeg was not found|No such file or directory: 'ffmpeg'",
        "Speech to text needs the program ffmpeg, which is not on the server's PATH.",
        "Install ffmpeg on the host, or add the package imageio-ffmpeg to the bundle and link its program as ffmpeg.",
    ),
    _row(
        "reranker-too-new",
        r"_ModelWrapper\.forward\(\) takes 1 positional argument",
        "This version of Xinference is older than its sentence-transformers: rerank broke with 5.2.",
        "Use sentence-transformers below 5.2 with Xinference 1.x.",
    ),
    _row(
        "remote-code",
        r"trust_remote_code",
        "The model carries code of its own, which Xinference 2.12 and later does not run unasked.",
        "After looking at that code, set allow_code: true in the model's entry, which lets the server run it.",
    ),
    _row(
        "package-missing",
        r"No module named '(?P<module>[^']+)'",
        "The Python package {module} is not installed where the server runs.",
        "Add it to the wheels of the bundle, or use an engine that does not need it.",
    ),
    # -- access
    _row(
        "key-may-not",
        r"API keys can only access model query and inference endpoints",
        "From Xinference 2.9 on, an API key may list and use models, and not launch or register them.",
        "Give username and password of an account with that permission.",
    ),
    _row(
        "banned",
        r"Too many failed attempts",
        "The server has banned this address or key after too many refused attempts.",
        "Wait an hour (XINFERENCE_RATE_LIMIT_IP_BAN_SECONDS), or restart the server; then use the right key.",
    ),
    _row(
        "wrong-credentials",
        r"Could not validate credentials|Incorrect username or password|API key (?:has expired|is disabled)",
        "The server does not accept the key or the login.",
        "Check api_key, or username and password. Do not try often: it bans an address after ten failures.",
    ),
    _row(
        "setup-token",
        r"Invalid setup token",
        "The setup token is not the one that this server printed at its first start.",
        "It stands in the log after `Setup token:`, and in auth/auth.db under XINFERENCE_HOME.",
    ),
    _row(
        "not-enough-permission",
        r"Not enough permissions|Password change required",
        "The account may not do this.",
        "Use an administrator, or let one grant the permission.",
    ),
    # -- the server itself
    _row(
        "half-dead",
        r"\[Errno 111\] Connection refused|Connect call failed \('127\.",
        "Nobody listens behind the API of the server any more: its worker has ended, and every model with it.",
        "Restart the server. The keeper and the health check of the container do so after a while; the end of the "
        "server's log may say why its worker ended.",
    ),
    _row(
        "engine-core",
        r"Engine core initialization failed|EngineCore failed to start|See (?:the )?(?:stack trace|root cause) above",
        "The engine ended while it started, and says why only in the server's log.",
        "Look for the first error of the engine in the log, above `Failed to load model`.",
    ),
    _row(
        "port-taken",
        r"address already in use|Errno 98|port is already allocated",
        "Another program listens on the port of the server.",
        "Find it with `ss -ltnp`, end it, or set another xinference_port.",
    ),
    # -- the container
    _row(
        "no-nvidia-driver",
        r"could not select device driver",
        "The Docker Engine of the host does not know how to give GPUs to containers.",
        "Install nvidia-container-toolkit from packages of the site, run `nvidia-ctk runtime configure "
        "--runtime=docker`, and restart the engine.",
    ),
    _row(
        "unknown-device",
        r"device error: (?P<gpu>\S+?): unknown device",
        "The driver of the host has no GPU {gpu}.",
        "Compare xinference_gpus with `nvidia-smi -L` on the host; a GPU that failed changes the numbers after it.",
    ),
    _row(
        "limit-refused",
        r"error setting rlimit",
        "The Docker Engine may not raise a limit as far as the container wants, because it runs in a container itself, "
        "for example.",
        "Lower the limit in xinference_server_ulimits, or leave it out.",
    ),
    _row(
        "mount-missing",
        r"bind source path does not exist: (?P<path>\S+)",
        "The container is to see {path}, which is not there on the host.",
        "Make it, or take it out of xinference_server_mounts; what the collection itself mounts comes back with "
        "playbooks/ship.yml and playbooks/serve.yml.",
    ),
    _row(
        "cancelled",
        r"Launch cancelled",
        "The launch was cancelled, by its time limit or by someone.",
        "Raise wait_timeout if the model only needs longer.",
    ),
)
