"""Models of Hugging Face, tiny and with random weights: one graph, the values of eager, the calls that must be ours."""

from __future__ import annotations

from collections import Counter
from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
backend = import_module("tilewright.torch.backend")

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 50, "dropout_rate": 0.0}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _model(name, config, **options):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


def _whisper_encoder():
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "encoder_layers": 1, "encoder_attention_heads": 2}
    config = transformers.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=10, dropout=0.0)
    return import_module("transformers.models.whisper.modeling_whisper").WhisperEncoder(config)


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 9))}


def padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    return {**tokens(), "attention_mask": mask}


def pictures():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def sounds():
    return {"input_features": torch.randn(2, 8, 20)}


#: name -> (model, inputs, calls that are ours in inference, those in training where they differ)
MODELS = {
    "llama": (
        _model("LlamaForCausalLM", "LlamaConfig", **_DECODER),
        tokens,
        {"rms_norm": 3, "linear": 4, "attention": 1, "linear+residual": 2, "gated+silu": 1},
        {},
    ),
    "llama, padded": (
        _model("LlamaForCausalLM", "LlamaConfig", **_DECODER),
        padded,
        {"rms_norm": 3, "linear": 4, "attention": 1, "linear+residual": 2, "gated+silu": 1},
        {},
    ),
    "qwen3": (
        _model("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=16),
        tokens,
        {"rms_norm": 5, "linear": 4, "attention": 1, "linear+residual": 2, "gated+silu": 1},
        {},
    ),
    "gemma2": (
        _model("Gemma2ForCausalLM", "Gemma2Config", **{**_DECODER, "num_hidden_layers": 2}, head_dim=16),
        tokens,
        {"rms_norm": 9, "linear": 11, "gated+gelu_tanh": 2, "attention+softcap+causal mask": 1,
         "attention+softcap+window": 1},
        {},
    ),
    "mixtral": (
        _model("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4),
        tokens,
        {"rms_norm": 2, "add_rms_norm": 1, "linear": 5, "linear+residual": 1, "attention": 1, "softmax": 1,
         "grouped_mm": 2},
        {},
    ),
    "bert": (
        _model("BertForMaskedLM", "BertConfig", **_ENCODER, **_QUIET, vocab_size=50),
        tokens,
        {"layer_norm": 4, "linear": 4, "attention": 1, "linear+residual": 2, "linear+gelu": 2},
        {"linear": 6, "linear+gelu": 0},
    ),
    "gpt2": (
        _model(
            *("GPT2LMHeadModel", "GPT2Config"),
            n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        tokens,
        {"layer_norm": 1, "add_layer_norm": 2, "linear": 5, "attention": 1},
        {},
    ),
    "t5 encoder": (
        _model("T5EncoderModel", "T5Config", **_T5),
        tokens,
        {"rms_norm": 3, "linear": 3, "attention": 1, "linear+residual": 2, "linear+relu": 1},
        {},
    ),
    "vit": (
        _model("ViTForImageClassification", "ViTConfig", **_ENCODER, **_QUIET, image_size=16, patch_size=8),
        pictures,
        {"layer_norm": 3, "linear": 4, "attention": 1, "linear+residual": 2, "linear+gelu": 1},
        {"linear": 5, "linear+gelu": 0},
    ),
    "whisper encoder": (
        _whisper_encoder,
        sounds,
        # the residual comes from a convolution in another order, which sums with it have in torch
        {"layer_norm": 3, "linear": 5, "attention": 1, "linear+gelu": 1},
        {"linear": 6, "linear+gelu": 0},
    ),
}  # fmt: skip


def compiled(model):
    """Without graph breaks, or it raises."""
    options = {"fallback": "eager", "cost_gate": False}
    return torch.compile(model, backend=backend.compile_graph, fullgraph=True, options=options)


def assert_taken(reports, expected):
    assert [report.taken for report in reports] and len(reports) == 1
    assert Counter(reports[0].taken) == Counter({name: count for name, count in expected.items() if count})


@pytest.mark.parametrize("name", MODELS)
def test_inference(reports, name):
    build, inputs, expected, _ = MODELS[name]
    model, given = build().eval(), inputs()
    with torch.no_grad():
        ours, theirs = compiled(model)(**given)[0], model(**given)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.std() > 0
    assert_taken(reports, expected)


@pytest.mark.parametrize("name", MODELS)
def test_three_training_steps(reports, name):
    build, inputs, expected, differing = MODELS[name]
    ours, theirs, given = build().train(), build().train(), inputs()
    theirs.load_state_dict(ours.state_dict())
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    for model, step in ((ours, compiled(ours)), (theirs, theirs)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            step(**given)[0].float().square().mean().backward()
            optimizer.step()
    for (name, weight), expected_weight in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(before[name], weight) for name, weight in ours.named_parameters())
    assert_taken(reports, {**expected, **differing})
