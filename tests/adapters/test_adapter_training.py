"""Training jobs: Trainer, DDP and FSDP2 over two processes, torch.compile, quantised bases."""

import pytest
import tiny
import torch
from kills import CONTEXT
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from workers import adapted, distributed_setups, tokens, train

import prep
from prep.adapters.cores import CORES


def cores_of(path):
    return {key: value for key, value in load_file(path).items() if ".core." in key}


@pytest.fixture(scope="module")
def two_processes(store, tmp_path_factory):
    """The folder with what two processes trained, and one."""
    folder = tmp_path_factory.mktemp("distributed")
    for world in (2, 1):
        ranks = [
            CONTEXT.Process(target=distributed_setups, args=(rank, world, str(store), str(folder)))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in ranks] == [0] * world
    return folder


@pytest.mark.parametrize("setup", ["ddp", "fsdp", "fsdp-bf16"])
def test_two_processes_train_as_one(two_processes, store, tmp_path, setup):
    model, adapter = adapted(store)
    prep.save(model, tmp_path / "start.safetensors")
    start = cores_of(tmp_path / "start.safetensors")
    if setup == "fsdp-bf16":
        expected = cores_of(two_processes / f"{setup}-1.safetensors")
    else:
        train(model, adapter, tokens(rows=4))
        prep.save(model, tmp_path / "end.safetensors")
        expected = cores_of(tmp_path / "end.safetensors")
    trained = cores_of(two_processes / f"{setup}-2.safetensors")
    assert trained.keys() == expected.keys()
    tolerance = 2e-2 if setup == "fsdp-bf16" else 1e-5
    for key in expected:
        assert trained[key].dtype == torch.float32
        moved = (expected[key] - start[key]).norm()
        assert moved > 0
        assert (trained[key] - expected[key]).norm() <= tolerance * moved + 1e-7 * start[key].norm(), key
    fresh = tiny.llama()
    prep.load(fresh, two_processes / f"{setup}-2.safetensors")


def rows_of_tokens():
    return [{"input_ids": row, "labels": row} for row in tokens(rows=16, length=8)]


def trainer(model, folder, steps, **arguments):
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        logging_steps=100,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=rows_of_tokens(), eval_dataset=rows_of_tokens()[:4])


def test_a_trainer_resumes_bitwise_from_checkpoints_that_hold_the_cores_only(store, tmp_path, recwarn):
    def fresh():
        torch.manual_seed(0)
        model = tiny.llama()
        return model, prep.attach(model, store, core="rotation", rank=8)

    model, adapter = fresh()
    trainer(model, tmp_path / "whole", 6).train()
    resumed, other = fresh()
    trainer(resumed, tmp_path / "parts", 6).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, two) in zip(adapter.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == {name for name, _ in adapter.named_parameters()}
    assert all(torch.equal(saved[name], value) for name, value in adapter.named_parameters())
    full = sum(value.numel() * value.element_size() for value in tiny.llama().state_dict().values())
    assert (tmp_path / "whole" / "checkpoint-6" / "model.safetensors").stat().st_size < 0.05 * full
    assert not [str(w.message) for w in recwarn if "prep.save" in str(w.message)]


def test_a_trainer_loads_the_best_checkpoint_at_the_end(store, tmp_path):
    torch.manual_seed(0)
    model = tiny.llama()
    adapter = prep.attach(model, store, core="dense", rank=8)
    job = trainer(
        model,
        tmp_path,
        9,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    job.train()
    losses = [entry["eval_loss"] for entry in job.state.log_history if "eval_loss" in entry]
    best = job.state.best_model_checkpoint
    assert best.endswith(f"checkpoint-{3 * (losses.index(max(losses)) + 1)}")
    assert not best.endswith("checkpoint-9")
    saved = load_file(f"{best}/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in adapter.named_parameters())


@pytest.mark.parametrize("name", list(CORES))
def test_an_adapted_block_compiles_whole_and_once(store, name):
    """With one core a whole block, with the others its three layers outside of the attention."""
    model = tiny.llama()
    adapter = prep.attach(model, store, core=name, rank=8)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block = model.model.layers[0] if name == "gain" else model.model.layers[0].mlp
    x = torch.randn(2, 6, 32)
    given = {"position_embeddings": model.model.rotary_emb(x, torch.arange(6)[None])} if name == "gain" else {}
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    parameters = [p for n, p in block.named_parameters() if p.requires_grad]

    def run(forward, s):
        with adapter.coeff(s):
            y = forward(x, **given)
        return y, *torch.autograd.grad(y.sin().sum(), parameters)

    run(compiled, 1.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in (0.5, -2.0, 0.0):
            for one, two in zip(run(compiled, s), run(block, s), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.stress)])
def test_compiled_code_under_checkpointing_uses_the_coefficient_of_the_forward(store, backend):
    """A compiled block is run again in the backward, when the coefficient has another value."""
    model = tiny.llama()
    adapter = prep.attach(model, store, core="dense", rank=8)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block = model.model.layers[0].mlp
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    parameters = [p for n, p in block.named_parameters() if p.requires_grad]
    x = torch.randn(3, 32, requires_grad=True)

    def gradients(forward):
        outputs = []
        for s in (0.5, -2.0):
            with adapter.coeff(s):
                outputs.append(forward(x))
        return torch.autograd.grad((outputs[0].sin() + outputs[1].cos()).sum(), parameters)

    expected = gradients(block)
    inner = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend=backend)
    for forward in (compiled, lambda x: checkpoint(compiled, x, use_reentrant=False), inner):
        for one, two in zip(gradients(forward), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_code_compiled_for_cuda_graphs_uses_the_coefficient_of_each_call(store):
    """On a CPU no graph is recorded; the operator is marked as one that no graph may hold."""
    model = tiny.llama()
    adapter = prep.attach(model, store, core="dense", rank=8)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block, x = model.model.layers[0].mlp, torch.randn(3, 32)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for s in (1.0, 0.5, -2.0, 0.0):
            with adapter.coeff(s):
                torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.prep.coefficient.default.tags


@pytest.mark.parametrize("name", ["gain", "dplr"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_trains(tmp_path, kind, name):
    """The probe accepts the quantised weights, attaching changes nothing, a manual loop trains the core."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(seed):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        layers = []
        for module in plain:
            if isinstance(module, nn.Linear):
                sizes = (module.in_features, module.out_features)
                if kind == "int8":
                    packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                else:
                    packed = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
                packed.load_state_dict(module.state_dict())
                module = packed.to("cpu")
            layers.append(module)
        return plain, nn.Sequential(*layers)

    plain, model = quantised(0)
    store = tiny.store(tmp_path / "prep.zarr", plain)
    x, target = torch.randn(32, 64), torch.randn(32, 64)
    model.eval()
    model(x)  # the first forward in evaluation repacks nf4 weights
    base = model(x)
    adapter = prep.attach(model, store, core=name)
    assert torch.equal(model(x), base)
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    prep.save(model, tmp_path / "adapter.safetensors")
    with pytest.raises(prep.PrepError, match="is quantised, sharded or sparse: only whole floating-point"):
        prep.merge(model)
    model.eval()
    trained = model(x)
    prep.detach(model)
    assert torch.equal(model(x), base)
    prep.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(model(x), trained)
    with pytest.raises(prep.PrepError, match=r"0 has other weights .*drift 1\d\d"):
        prep.attach(quantised(1)[1], store)
