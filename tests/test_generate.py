"""Text from a model: the cache against whole passes, which bytes a prediction sees, and the draws."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rarefy
from rarefy.models import GPT, GPTConfig, generate, timed_generate
from rarefy.models.cache import Cache

TINY = GPTConfig(width=32, layers=2, heads=4, context=16)


def model_of(density: float, block: int | tuple[int, int] = 1, config: GPTConfig = TINY) -> GPT:
    """A dense or sparse model in evaluation mode, the same every time."""
    model = GPT(config, torch.Generator().manual_seed(5))
    if density < 1:
        rarefy.sparsify(model, rarefy.Plan(density=density, block=block, keep_dense=("head",)))
    return model.eval()


MODELS = {
    "dense": model_of(1),
    "unstructured": model_of(0.3),
    "4x4": model_of(0.3, 4),
    "8x1": model_of(0.3, (8, 1)),
    "learned": model_of(0.3, config=dataclasses.replace(TINY, positions="learned", token_shift=False)),
    "rotary": model_of(0.3, config=dataclasses.replace(TINY, token_shift=False)),
    "narrow": model_of(0.3, config=dataclasses.replace(TINY, attention=16)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GPT:
    return MODELS[request.param]


def uncached(model: GPT, prompt: bytes, num_bytes: int, temperature: float, seed: int) -> bytes:
    """Each byte from a whole pass over the bytes that `generate` says it sees, without a cache."""
    generator, text, context = torch.Generator().manual_seed(seed), list(prompt), model.config.context
    first = max(0, len(text) - context)
    for _ in range(num_bytes):
        if len(text) - first > context:
            first = len(text) - max(1, context // 2)
        with torch.no_grad():
            logits = model(torch.tensor([text[first:]]))[0, -1]
        if temperature == 0:
            text.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / temperature, dim=0)
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text[len(prompt) :])


# -- the cache ---------------------------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=16),
    batch=st.integers(1, 3),
    name=st.sampled_from(["unstructured", "learned", "rotary"]),
)
def test_steps_of_any_size_predict_what_a_whole_pass_predicts(cuts, batch, name):
    model = MODELS[name]
    cuts = [cut for i, cut in enumerate(cuts) if sum(cuts[: i + 1]) <= 16] or [1]
    tokens = torch.randint(256, (batch, sum(cuts)), generator=torch.Generator().manual_seed(len(cuts)))
    cache, first = Cache(TINY.layers, TINY.context), 0
    with torch.no_grad():
        whole = model(tokens)
        for cut in cuts:
            logits = model.step(tokens[:, first : first + cut], cache)
            first += cut
            # Rounding only: two layers in fp32 over sums of at most 128 products of order 1.
            torch.testing.assert_close(logits, whole[:, first - 1], rtol=1e-4, atol=1e-5)
    assert cache.length == first


def test_a_cleared_cache_forgets(model):
    cache, tokens = Cache(TINY.layers, TINY.context), torch.arange(7)[None]
    with torch.no_grad():
        fresh = model.step(tokens, cache)
        model.step(tokens + 40, cache)
        cache.clear()
        assert cache.length == 0
        assert torch.equal(model.step(tokens, cache), fresh)


def test_more_than_the_context_is_refused():
    cache, model = Cache(TINY.layers, TINY.context), MODELS["dense"]
    with torch.no_grad():
        model.step(torch.zeros(1, 12, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match=r"12 \+ 5 bytes are more than the context of 16"):
            model.step(torch.zeros(1, 5, dtype=torch.int64), cache)
        assert cache.length == 12
        with pytest.raises(ValueError, match="17 positions do not fit a cache for 16"):
            cache.layers[0].append(torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 5, 8))


# -- what a prediction sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("prompt", [b"a", b"def f(x):", b"0123456789abcdef", b"0123456789" * 3], ids=len)
def test_the_cache_changes_no_byte(model, prompt, temperature):
    """While the text fits the context, past its end, where the window halves, and from prompts longer than it."""
    expected = uncached(model, prompt, 40, temperature, seed=3)
    assert generate(model, prompt, 40, temperature=temperature, seed=3) == expected


def test_windows():
    """With a context of 4: the whole text up to 4 bytes, then its newer half, which grows to 4 again."""
    model = GPT(GPTConfig(width=8, layers=1, heads=1, context=4))
    seen, text = [], b"ab"
    step = model.step

    def watched(tokens_BT, past):
        seen.append((past.length, tokens_BT[0].tolist()))
        return step(tokens_BT, past)

    model.step = watched
    text += generate(model, text, 7, temperature=0)
    assert (
        seen
        == [
            (0, [*text[0:2]]),
            (2, [text[2]]),
            (3, [text[3]]),
            (0, [*text[3:5]]),  # the fifth byte does not fit: the last two start anew
            (2, [text[5]]),
            (3, [text[6]]),
            (0, [*text[6:8]]),
        ]
    )


def test_a_context_of_one_sees_one_byte():
    model = model_of(1, config=GPTConfig(width=8, layers=1, heads=1, context=1))
    assert generate(model, b"xyz", 5, seed=2) == uncached(model, b"xyz", 5, 0.8, seed=2)


def test_the_window_is_the_end_of_the_text(model):
    assert generate(model, b"0123456789" + b"a" * 16, 3) == generate(model, b"a" * 16, 3)


# -- draws -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_and_leaves_torchs_generator_alone(model):
    model.train()
    state = torch.get_rng_state()
    texts = [generate(model, b"def ", 40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 40
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_the_number_of_threads_changes_no_byte():
    model, before, texts = MODELS["unstructured"], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            texts.append(generate(model, b"def ", 40))
    finally:
        torch.set_num_threads(before)
    assert texts[0] == texts[1] == texts[2]


def test_temperature_zero_takes_the_likeliest_byte():
    model = MODELS["dense"]
    text = b"abc"
    for _ in range(5):
        text += bytes([int(model(torch.tensor([list(text)]))[0, -1].argmax())])
    assert generate(model, b"abc", 5, temperature=0) == text[3:]
    assert generate(model, b"abc", 5, top_k=1, seed=7) == text[3:]


def test_top_k_draws_from_the_likeliest_only():
    model = MODELS["dense"]
    likeliest = set(model(torch.tensor([list(b"x")]))[0, -1].topk(3).indices.tolist())
    drawn = {generate(model, b"x", 1, temperature=5.0, top_k=3, seed=seed)[0] for seed in range(40)}
    assert drawn == likeliest


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(MODELS["dense"], b"", 1, **wrong)
    with pytest.raises(ValueError, match="number of bytes must not be negative, got -1"):
        generate(MODELS["dense"], b"", -1)


# -- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, read", [(b"", 1), (b"abc", 3), (b"a" * 50, 16)], ids=["none", "short", "long"])
def test_times_say_what_was_read_and_written(prompt, read):
    made = timed_generate(MODELS["dense"], prompt, 5)
    assert (made.prompt_bytes, len(made.text)) == (read, 5)
    assert made.prompt_bytes_per_s == pytest.approx(read / made.prompt_s)
    assert made.decode_bytes_per_s == pytest.approx(4 / made.decode_s)


def test_nothing_to_write_takes_no_time():
    made = timed_generate(MODELS["dense"], b"abc", 0)
    assert (made.text, made.prompt_bytes, made.prompt_s, made.decode_s) == (b"", 0, 0.0, 0.0)
    assert made.prompt_bytes_per_s is None and made.decode_bytes_per_s is None
    assert timed_generate(MODELS["dense"], b"abc", 1).decode_bytes_per_s is None
