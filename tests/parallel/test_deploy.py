"""What deploy/ and docs/multi-node.md give to torchrun is what torchrun takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from nanoworks.config import load_recipe

ROOT = Path(__file__).parents[2]


def check(words: list[str]) -> Any:
    """Parse torchrun's arguments with its own parser, and those of `nanoworks train` as a recipe and overrides."""
    try:
        found = get_args_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"torchrun does not take {words}")
    assert (found.module, found.training_script, found.training_script_args[0]) == (True, "nanoworks", "train")
    recipe, *overrides = [w for w in found.training_script_args[1:] if w != "--resume"]
    assert load_recipe(recipe, [o for o in overrides if "=" in o], environ={}).checkpoint.every == 500
    return found


@pytest.mark.parametrize("name", ["jobset", "pytorchjob"])
def test_kubernetes(name: str) -> None:
    spec = yaml.safe_load((ROOT / f"deploy/kubernetes/{name}.yaml").read_text())
    if name == "jobset":
        job = spec["spec"]["replicatedJobs"][0]
        pods = job["template"]["spec"]
        assert pods["completionMode"] == "Indexed"
        template, nodes = pods["template"], pods["completions"]
        # JobSet's name of the first pod: set, job, index of the job, index of the pod, then the set's service.
        endpoint = f"{spec['metadata']['name']}-{job['name']}-0-0.{spec['metadata']['name']}:29400"
    else:
        worker = spec["spec"]["pytorchReplicaSpecs"]["Worker"]
        template, nodes, endpoint = worker["template"], worker["replicas"], ""
    container = template["spec"]["containers"][0]
    found = check(container["args"])
    assert "--resume" in container["args"]
    if name == "jobset":
        assert (found.nnodes, found.rdzv_endpoint, found.max_restarts) == (str(nodes), endpoint, 3)
        assert int(found.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]} == {"runs", "shm"}
    seconds = {e["name"]: int(e["value"]) for e in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert seconds < template["spec"]["terminationGracePeriodSeconds"]


def test_slurm() -> None:
    file = ROOT / "deploy/slurm/train.sbatch"
    subprocess.run(["bash", "-n", file], check=True)
    text = file.read_text().replace("\\\n", " ")
    [command] = re.findall(r"^srun .*? torchrun (.*?) \|\|", text, re.M)
    given = "pretrain/llama-1b run.name=llama-1b checkpoint.every=500"
    assert given in text.splitlines()[3]  # what the example of the file gives
    found = check(shlex.split(command.replace('"$@"', given)))
    assert (found.nnodes, found.rdzv_endpoint) == ("$SLURM_NNODES", "$first:29400")


def test_the_commands_of_the_documentation() -> None:
    text = (ROOT / "docs/multi-node.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^torchrun (.*)$", text, re.M)
    assert commands
    for command in commands:
        check(shlex.split(command))
