"""The model compared with transformers' stock decoders; independence of packed documents."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data_pipeline.loading.rows import IGNORED_TARGET
from megaback.model.gpt import ReverseGPT, _recomputed
from megaback.weights.hf_config import to_stock
from tests.helpers.small_models import VOCAB_SIZE, make_model, packed, random_ids, section


def stock_model(model: ReverseGPT) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """transformers' model of the same shape with the same weights."""
    shape = model.shape
    config_class, model_class = (
        (Qwen3Config, Qwen3ForCausalLM) if shape.qk_norm else (LlamaConfig, LlamaForCausalLM)
    )
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.width,
        intermediate_size=shape.hidden_mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters=to_stock(shape, VOCAB_SIZE, 256, "float32")["rope_parameters"],
        tie_word_embeddings=shape.tie_embeddings,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    stock = model_class(config).eval()
    stock.load_state_dict(model.state_dict())  # strict: every name is a stock name
    return stock


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@torch.no_grad()
def test_logits_equal_those_of_the_stock_architecture(
    qk_norm: bool, num_kv_heads: int | None, tie_embeddings: bool
) -> None:
    model = make_model(qk_norm=qk_norm, num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings)
    ids_T = random_ids(70)

    expected_TV = stock_model(model)(ids_T[None]).logits[0]

    logits_TV = model.logits(ids_T, *packed(70))
    assert expected_TV.std() > 0.1
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@torch.no_grad()
def test_wide_heads_and_scaled_positions_equal_those_of_the_stock_architecture(
    qk_norm: bool,
) -> None:
    scaling = {"rope_scaling_factor": 8.0, "rope_original_context_tokens": 64}
    model = make_model(qk_norm=qk_norm, head_dim=32, **scaling)
    ids_T = random_ids(200)

    expected_TV = stock_model(model)(ids_T[None]).logits[0]

    logits_TV = model.logits(ids_T, *packed(200))
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)
    unscaled = make_model(qk_norm=qk_norm, head_dim=32)
    assert (unscaled.logits(ids_T, *packed(200)) - expected_TV).abs().max() > 0.01


@torch.no_grad()
def test_a_packed_document_has_the_same_logits_as_alone() -> None:
    model = make_model()
    lengths = (5, 1, 30, 12)
    ids_T = random_ids(sum(lengths))

    together = model.logits(ids_T, *packed(*lengths)).split(lengths)

    for document, logits_TV in zip(ids_T.split(lengths), together, strict=True):
        alone_TV = model.logits(document, *packed(len(document)))
        largest = alone_TV.abs().max()
        assert (logits_TV - alone_TV).abs().max() <= 1e-6 * largest


@torch.no_grad()
def test_the_order_of_earlier_tokens_changes_a_later_tokens_logits() -> None:
    model = make_model()
    ids_T = torch.arange(20)
    shuffled_T = torch.cat([ids_T[:15].flip(0), ids_T[15:]])

    logits_V = model.logits(ids_T, *packed(20))[-1]

    assert (model.logits(shuffled_T, *packed(20))[-1] - logits_V).abs().max() > 1e-3


@torch.no_grad()
def test_changing_a_later_token_leaves_earlier_logits_bitwise_equal() -> None:
    model = make_model()
    ids_T = random_ids(24)
    changed_T = ids_T.clone()
    changed_T[15:] = (changed_T[15:] + 1) % VOCAB_SIZE

    before, after = (model.logits(ids, *packed(24)) for ids in (ids_T, changed_T))

    assert torch.equal(before[:15], after[:15])
    assert not torch.equal(before[15:], after[15:])


@torch.no_grad()
def test_changing_one_document_leaves_the_others_logits_bitwise_equal() -> None:
    model = make_model()
    ids_T = random_ids(24)
    changed_T = ids_T.clone()
    changed_T[8:16] = (changed_T[8:16] + 1) % VOCAB_SIZE

    before, after = (model.logits(ids, *packed(8, 8, 8)) for ids in (ids_T, changed_T))

    assert torch.equal(before[:8], after[:8])
    assert torch.equal(before[16:], after[16:])


def test_no_gradient_flows_from_one_document_into_another() -> None:
    model = make_model()
    seen: list[Tensor] = []

    def remember(_module: object, _inputs: object, output_TD: Tensor) -> None:
        output_TD.retain_grad()
        seen.append(output_TD)

    model.model.embed_tokens.register_forward_hook(remember)
    targets_T = random_ids(24, seed=1)
    targets_T[:8] = targets_T[16:] = IGNORED_TARGET

    model(random_ids(24), targets_T, *packed(8, 8, 8)).sum().backward()

    gradient_T = seen[0].grad.abs().sum(1)
    assert gradient_T[8:16].min() > 0
    assert gradient_T[:8].max() == gradient_T[16:].max() == 0


def test_initial_weights_depend_only_on_the_seed() -> None:
    models = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        models.append(ReverseGPT(section(), VOCAB_SIZE))
        models[-1].initialize(7)

    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights() -> None:
    model = ReverseGPT(section(), VOCAB_SIZE)
    heads = []
    for seed in (7, 8):
        model.initialize(seed)
        heads.append(model.lm_head.weight.clone())

    assert not torch.equal(*heads)


@pytest.mark.parametrize("num_layers", [2, 8])
def test_weights_that_write_to_the_residual_stream_are_scaled_by_depth(num_layers: int) -> None:
    model = ReverseGPT(section(num_layers=num_layers, width=128), VOCAB_SIZE)
    model.initialize(3)

    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0
        elif "o_proj" in name or "down_proj" in name:
            expected = 0.02 / math.sqrt(2 * num_layers)
        else:
            expected = 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@torch.no_grad()
def test_the_loss_of_an_untrained_model_is_about_that_of_uniform_predictions() -> None:
    model = ReverseGPT(section(), VOCAB_SIZE)
    model.initialize(3)

    loss = model(random_ids(200), random_ids(200, seed=1), *packed(200)).mean()

    assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.05)


@torch.no_grad()
def test_ignored_targets_have_no_loss() -> None:
    model = make_model()
    ids_T, targets_T = random_ids(20), random_ids(20, seed=1)
    targets_T[[0, 7, 19]] = IGNORED_TARGET

    nats_TV = -F.log_softmax(model.logits(ids_T, *packed(20)), -1)
    expected = [
        0.0 if place in (0, 7, 19) else float(nats_TV[place, targets_T[place]])
        for place in range(20)
    ]

    assert model(ids_T, targets_T, *packed(20)).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    model = make_model()

    loss = model(random_ids(6), torch.full((6,), IGNORED_TARGET), *packed(6)).sum()
    loss.backward()

    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(kind: str) -> None:
    losses, gradients = [], []
    for recompute in ("none", kind):
        model = make_model().train()
        model.checkpoint_activations(recompute)
        loss = model(random_ids(20), random_ids(20, seed=1), *packed(12, 8)).sum()
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])

    assert losses[0] == losses[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def kept_bytes(kind: str) -> int:
    """Bytes of activations that a forward pass in bf16 saves for the backward pass."""
    model = make_model().bfloat16().train()
    model.checkpoint_activations(kind)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: its address is not reused
        return tensor

    def recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                keep(argument)
        return _recomputed(function, *arguments)

    for module in model.modules():
        if getattr(module, "elementwise", None) is _recomputed:
            module.elementwise = recomputed
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(random_ids(2000), *packed(1200, 800))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_recomputing_more_saves_more_activation_memory() -> None:
    assert kept_bytes("selective") < 0.85 * kept_bytes("none")
    assert kept_bytes("block") < 0.5 * kept_bytes("selective")


def test_activation_checkpointing_recomputes_the_blocks() -> None:
    model = make_model().train()
    model.checkpoint_activations("block")
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))

    model(random_ids(20), random_ids(20, seed=1), *packed(20)).sum().backward()

    assert len(calls) == 2


def test_tied_embeddings_are_counted_once() -> None:
    untied, tied = (make_model(tie_embeddings=tied).num_parameters() for tied in (False, True))

    assert untied - tied == VOCAB_SIZE * section().width


def test_a_compiled_model_is_not_recompiled_for_other_segments() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = make_model(num_layers=1)
    expected = [model.logits(random_ids(12), *packed(*lengths)) for lengths in ((5, 7), (2, 9, 1))]
    model.exclude_attention_from_compile()
    compiled = torch.compile(model.logits, backend=count)
    first = compiled(random_ids(12), *packed(5, 7))
    num_graphs = len(graphs)
    second = compiled(random_ids(12), *packed(2, 9, 1))
    assert len(graphs) == num_graphs > 1
    torch.testing.assert_close([first, second], expected)
