"""A model split over two processes computes what it computes whole."""

import copy
import os

import processes
import pytest
import torch
from helpers import refused
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lrsa_lit.attention import Greedy, LRSAConfig, enable, using
from lrsa_lit.data.collate import IGNORE_INDEX
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.strategies import is_sharded, shard
from lrsa_lit.systems import KeyNorm, KVzip, SqueezedAttention
from lrsa_lit.tasks.losses_behind_prompts import losses_behind_prompts

RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)
CLIP = 0.5
# One whose answers come token by token, one that has prompts repeated, of unequally many parts, and one of neither.
SYSTEMS = {type(each).__name__: each for each in (SqueezedAttention(observed=9), KVzip(chunk=32), KeyNorm())}


def backbone(**options):
    return enable(Backbone("tiny", **options).build(), RULE)


def adapted(**options):
    # Adapters begin with random weights.
    torch.manual_seed(0)
    return backbone(lora=LoRA(rank=4), **options)


def tied():
    config = tiny_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return enable(type(tiny_model())(copy.deepcopy(config)).train(), RULE)


MODELS = {
    "full": lambda: backbone(),
    "tied": tied,
    "recomputed": lambda: backbone(gradient_checkpointing=True),
    "lora": lambda: adapted(gradient_checkpointing=True),
    # Adapters are in float32 above a frozen base in bfloat16.
    "lora on bf16": lambda: adapted(dtype="bfloat16"),
}


def rows(count=processes.COUNT):
    return torch.randint(3, 259, (count, 120), generator=torch.Generator().manual_seed(0))


def trained(model, batch):
    """The model after two clipped steps; and the norms of its gradients."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    norms = []
    for _ in range(2):
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.grad is not None], CLIP)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def answers(model, prompts, stops, *, synced):
    rule = RULE.replace(top_k=6)
    with torch.no_grad(), using(model.eval(), rule):
        (tokens,) = Greedy(model, stops, max_new_tokens=8, synced=synced)(prompts)
    return tokens


def losses(model, system, rank):
    """Of a prompt and an answer of another length in each process."""
    prompt, size = rows()[rank : rank + 1, : 100 - 30 * rank], (1, 4)[rank]
    labels = torch.full((1, 6), IGNORE_INDEX)
    labels[:, :size] = prompt[:, 7 : 7 + size]
    batch = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "labels": labels}
    with using(model.eval(), LRSAConfig(system=SYSTEMS[system])):
        return losses_behind_prompts(model, batch, tiny_tokenizer())


def of_one_process(rank, port, found):
    """Train and generate with sharded models; what came out goes to the parent."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(processes.COUNT))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (processes.COUNT,))
    results = {}
    for name, make in MODELS.items():
        model = make()
        shard(model, mesh)
        assert is_sharded(model)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        norms = trained(model, rows()[rank : rank + 1])
        weights = {key: w.full_tensor() for key, w in model.named_parameters() if w.requires_grad}
        results[name] = norms, weights
    # Prompts of two lengths, one of which ends at once: the other process goes on alone.
    model = backbone()
    shard(model, mesh)
    prompt = rows()[rank : rank + 1, : 100 - 30 * rank]
    first = answers(model, prompt, [], synced=True)[0]
    results["answers"] = answers(model, prompt, [first] if rank == 0 else [], synced=True)
    results["losses"] = {system: losses(model, system, rank) for system in SYSTEMS}
    torch.save(results, found / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = tmp_path_factory.mktemp("sharded")
    processes.start(of_one_process, found)
    return [torch.load(found / f"{rank}.pt", weights_only=True) for rank in range(processes.COUNT)]


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_the_whole_model(name, results):
    model = MODELS[name]()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    norms = trained(model, rows())
    coarse = {"atol": 2e-3, "rtol": 2e-2} if "bf16" in name else {"atol": 1e-5, "rtol": 1e-4}
    for found_norms, weights in (result[name] for result in results):
        assert found_norms == pytest.approx(norms, rel=coarse["rtol"])
        assert min(found_norms) > CLIP
        assert weights.keys() == before.keys()
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weights[key], weight.detach(), **coarse)
    assert any(not torch.equal(model.get_parameter(key), weight) for key, weight in before.items())


def test_answers_are_those_of_the_whole_model_and_nobody_waits(results):
    for rank, result in enumerate(results):
        alone = answers(backbone(), rows()[rank : rank + 1, : 100 - 30 * rank], [], synced=False)
        assert result["answers"] == (alone if rank else [])


@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_behind_prompts_are_those_of_the_whole_model_and_nobody_waits(system, results):
    for rank, result in enumerate(results):
        alone = losses(backbone(), system, rank)
        torch.testing.assert_close(result["losses"][system], alone, rtol=0, atol=1e-4)


def test_models_that_cannot_be_sharded():
    model = tiny_model()
    model._no_split_modules = None
    with refused("strategy", "LlamaForCausalLM"):
        shard(model, None)
    model = tiny_model()
    model.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    with refused("strategy", reason="quantized"):
        shard(model, None)
