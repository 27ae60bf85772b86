"""`nanoworks serve CHECKPOINT`: an OpenAI-compatible endpoint and a chat page over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve_command(
    checkpoint: Annotated[str, typer.Argument(help="A run, a step, a model directory or a hub id.")],
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API; default: the checkpoint's.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers computed at the same time.")] = 16,
    max_batch_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of a step; fewer let others' tokens through while long prompts are read. "
            "0: 128 on a CPU, else 2048.",
        ),
    ] = 0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come back.")] = 1024,
    kv_memory: Annotated[
        float | None, typer.Option(min=0.001, help="GiB for the KV cache; default: room for all, or a quarter of all.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, xpu or mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes to spread the model over; a GPU each, or the CPU's threads shared.")
    ] = 1,
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(
            help="Round the weights while loading: int8 takes half the memory of bfloat16 and is hardly less exact, "
            "int4 a quarter and is noticeably less exact in small models."
        ),
    ] = "none",
    kv_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option(
            help="Of the keys and values of past tokens: int8 holds nearly twice the tokens of bfloat16; CPU only."
        ),
    ] = "auto",
    speculate: Annotated[
        Literal["none", "ngram", "draft", "medusa"],
        typer.Option(help="Guess tokens ahead and verify them together: the same answers, faster."),
    ] = "none",
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model for `draft`; for `medusa` a run with heads, default CHECKPOINT.")
    ] = None,
    max_draft: Annotated[int, typer.Option(min=1, max=64, help="Tokens guessed ahead at most.")] = 8,
    auth: Annotated[
        bool, typer.Option("--auth", help="Every request but a probe needs a key; `nanoworks keys create` makes them.")
    ] = False,
    keys_db: Annotated[
        str | None,
        typer.Option(
            envvar="NANOWORKS_KEYS_DB",
            help="Of keys and usage: a file, or postgresql://USER:PASSWORD@HOST/NAME. Default: a file of yours.",
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="NANOWORKS_REDIS_URL", help="For limits that several servers share: redis://HOST:6379/0."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Another site whose pages may call, e.g. https://chat.example; may be given again."),
    ] = None,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Of one request.")] = 16,
    access_log: Annotated[
        str, typer.Option(help="A line of JSON for each request: a file, - for standard error, or none.")
    ] = "-",
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what was asked into the access log, too.")
    ] = False,
    tls_cert: Annotated[str | None, typer.Option(help="A PEM file: serve https with this certificate.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key, if that is in a file of its own.")] = None,
    warmup: Annotated[
        bool, typer.Option("--warmup", help="Run prompts of the usual lengths first; nobody waits for first times.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long answers under way may go on after SIGTERM or Ctrl-C.")
    ] = 20,
    canary_seconds: Annotated[
        float, typer.Option(min=0.1, help="Without a computed token for so long, /ready says no.")
    ] = 5,
    hang_seconds: Annotated[
        float, typer.Option(min=1, help="An engine that has work and does nothing for so long is started again.")
    ] = 60,
) -> None:
    """Serve a model: OpenAI's API under /v1, probes, metrics, and a chat page at /."""
    from nanoworks.engine.config import EngineConfig
    from nanoworks.engine.remote import EngineSpec
    from nanoworks.serve.server import check_tls, listen, run
    from nanoworks.serve.settings import ServerSettings
    from nanoworks.serve.supervisor import Supervisor

    settings = ServerSettings(
        auth=auth,
        keys_db=keys_db,
        redis_url=redis_url,
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=int(max_body_mib * 2**20),
        access_log=None if access_log == "none" else access_log,
        log_prompts=log_prompts,
        tls_cert=tls_cert,
        tls_key=tls_key,
        drain_seconds=drain_seconds,
        canary_seconds=canary_seconds,
    )
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_queue=max_queue,
        kv_memory=kv_memory,
        tensor_parallel=tensor_parallel,
        quantize=None if quantize == "none" else quantize,
        kv_dtype=kv_dtype,
        speculate=speculate,
        draft_model=draft_model,
        max_draft=max_draft,
    )
    check_tls(settings)
    # The port is taken first: a mistake there should not cost the time to load a model.
    with listen(host, port) as sock:
        spec = EngineSpec(checkpoint, config, device=device, dtype=dtype, warmup=warmup)
        engine = Supervisor(spec, hang_seconds=hang_seconds)
        try:
            from nanoworks.serve.app import create_app, open_access  # while the model is being loaded

            access = open_access(settings)
            engine.wait()
            name = name or _name(checkpoint)
            app = create_app(engine, name=name, settings=settings, access=access, lineage=engine.lineage)
            run(app, sock, model=name)
        finally:
            engine.shutdown()


def _name(checkpoint: str) -> str:
    """The run's name for one of its steps, else the last part of the path or hub id."""
    path = Path(checkpoint).resolve()
    return path.parent.name if path.name.startswith("step-") else path.name
