"""The token stream against a plain loop without a cache, the sampling functions, and the text stream."""

import random

import helpers
import pytest
import torch

from lit_gpt import GPT
from lit_gpt.generate import generate, keep_top_p, sample, stream_text
from lit_gpt.tokenizer import Tokenizer


def tiny_model(**overrides) -> GPT:
    """Return a random model with as many k and v heads as q heads, 60 ids in 64 rows, and a context of 48."""
    sizes = dict(block_size=48, vocab_size=60, padded_vocab_size=64, n_query_groups=4)
    return helpers.tiny_model(**(sizes | overrides))


@torch.no_grad()
def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(model.eval()(torch.tensor([ids]))[0, -1, : model.config.vocab_size].argmax().item())
    return ids[len(prompt) :]


MODELS = {
    "MHA": {},
    "GQA": dict(n_query_groups=2),
    "MQA": dict(n_query_groups=1),
    "sliding window": dict(sliding_window=6, n_query_groups=2),
    "window shorter than the prompt": dict(sliding_window=3),
    "NeoX": dict(norm_class="LayerNorm", mlp_class="GptNeoxMLP", parallel_residual=True, rotary_percentage=0.25),
    "head_size * n_head != n_embd": dict(head_size=12, n_query_groups=2),
    "MoE": dict(mlp_class="LLaMAMoE", n_expert=4, n_expert_per_token=2),
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_greedy_with_and_without_the_cache_is_identical(overrides):
    model = tiny_model(**overrides)
    prompt = [5, 9, 2, 33]
    assert list(generate(model, prompt, max_new_tokens=40)) == greedy_without_cache(model, prompt, 40)


def test_it_ends_at_max_new_tokens_at_the_end_of_the_context_and_before_a_stop_id():
    model = tiny_model()
    assert len(list(generate(model, [1, 2], max_new_tokens=7))) == 7
    assert list(generate(model, [1, 2], max_new_tokens=0)) == []
    whole = list(generate(model, [1, 2], max_new_tokens=1000))
    assert len(whole) == 46
    assert list(generate(model, list(range(48)), max_new_tokens=5)) == []
    stop = whole[9]
    assert list(generate(model, [1, 2], max_new_tokens=1000, stop_ids={stop})) == whole[: whole.index(stop)]


def test_padding_ids_are_never_chosen():
    model = tiny_model(lm_head_bias=True)
    model.lm_head.bias.data[60:] = 1e4
    model.lm_head.bias.data[7] = 1e3
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 64}, {"temperature": 1.0, "top_p": 1.0}):
        assert list(generate(model, [1], max_new_tokens=5, **settings)) == [7] * 5


def test_bad_requests_raise_at_the_call_and_touch_nothing():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"prompt has 49 tokens.*context holds 48"):
        generate(model, [1] * 49, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"temperature .* -1.*; top_k .* 0; top_p .* 1.5"):
        generate(model, [1], max_new_tokens=1, temperature=-1, top_k=0, top_p=1.5)
    assert model.training and model.transformer.h[0].attn.kv_cache is None


def test_the_model_is_as_before_when_the_consumer_stops_early():
    model = tiny_model()
    model.transformer.h[1].mlp.eval()  # not all modules need to be in one mode
    modes = [module.training for module in model.modules()]

    def untouched() -> bool:
        same_mode = [module.training for module in model.modules()] == modes
        return same_mode and all(block.attn.kv_cache is None for block in model.transformer.h)

    grad_modes = set()
    hook = model.lm_head.register_forward_hook(lambda *_: grad_modes.add(torch.is_grad_enabled()))
    for _ in generate(model, [1, 2], max_new_tokens=20):
        assert torch.is_grad_enabled(), "gradients are off for the model alone, not for who reads the tokens"
        break
    hook.remove()
    assert grad_modes == {False}
    assert untouched() and torch.is_grad_enabled()
    tokens = generate(model, [1, 2], max_new_tokens=20)
    next(tokens)
    assert not model.training
    tokens.close()
    assert untouched()
    with pytest.raises(KeyboardInterrupt):
        for _ in generate(model, [1, 2], max_new_tokens=20):
            raise KeyboardInterrupt
    assert untouched()
    model(torch.tensor([[1, 2, 3]]), targets=torch.tensor([[2, 3, 4]])).backward()
    assert model.lm_head.weight.grad is not None


def test_samples_are_those_of_the_seed_and_leave_the_global_generator_alone():
    model = tiny_model()
    state = torch.get_rng_state()
    first = list(generate(model, [1], max_new_tokens=30, temperature=1.5, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert list(generate(model, [1], max_new_tokens=30, temperature=1.5, seed=7)) == first
    assert list(generate(model, [1], max_new_tokens=30, temperature=1.5, seed=8)) != first
    generator = torch.Generator().manual_seed(7)
    assert list(generate(model, [1], max_new_tokens=30, temperature=1.5, generator=generator)) == first
    assert list(generate(model, [1], max_new_tokens=30, temperature=1.5, generator=generator)) != first


@pytest.mark.parametrize("overrides", [{}, dict(n_query_groups=2, sliding_window=6)], ids=["full", "window"])
def test_a_conversation_is_computed_from_where_it_differs(overrides):
    model = tiny_model(**overrides)
    computed: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].size(1)))
    cached: list[int] = []
    prompt = [5, 9, 2, 33, 7]
    first = list(generate(model, prompt, max_new_tokens=6, cached=cached))
    assert computed == [5, 1, 1, 1, 1, 1] and cached == prompt + first[:-1]
    requests = (
        [*prompt, *first, 11, 12],  # goes on; the cache grows, so all of it is computed
        [*prompt, *first, 11, 12],  # the same again: its last token alone gives the next one
        [*prompt, *first, 11, 40, 41],  # differs from its last token but two
        [5, 9, 1],  # begins anew
    )
    for request, expected in zip(requests, (13, 1, 2, 1), strict=True):
        computed.clear()
        tokens = list(generate(model, request, max_new_tokens=6, cached=cached))
        assert computed[0] == expected
        assert tokens == greedy_without_cache(model, request, 6)
    model.clear_kv_cache()  # whoever cleared it meanwhile: the list does not lie
    assert list(generate(model, requests[1], max_new_tokens=6, cached=cached)) == greedy_without_cache(
        model, requests[1], 6
    )


def test_an_interrupted_pass_leaves_no_half_computed_ids_in_the_conversation():
    model = tiny_model()
    cached: list[int] = []
    prompt = [5, 9, 2, 33, 7]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.transformer.h[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(generate(model, prompt, max_new_tokens=6, cached=cached))
    hook.remove()
    assert cached == [] and model.training
    assert list(generate(model, prompt, max_new_tokens=6, cached=cached)) == greedy_without_cache(model, prompt, 6)


def test_sampling_follows_the_softmax():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        draws = [sample(logits, temperature=temperature, generator=generator).item() for _ in range(8000)]
        seen = torch.bincount(torch.tensor(draws), minlength=4) / 8000
        # four standard deviations of a share at 8,000 draws
        assert torch.allclose(seen, (logits / temperature).softmax(-1), atol=4 * (0.25 / 8000) ** 0.5)


def test_top_k_and_top_p_keep_the_smallest_sets():
    probs = torch.tensor([0.05, 0.4, 0.2, 0.05, 0.3])
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings) -> set[int]:
        draws = (sample(probs.log(), temperature=1.0, generator=generator, **settings) for _ in range(400))
        return {draw.item() for draw in draws}

    assert drawn(top_k=1) == {1} and drawn(top_k=2) == {1, 4} and drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.35) == {1} and drawn(top_p=0.41) == {1, 4} and drawn(top_p=0.69) == {1, 4}
    assert drawn(top_p=0.71) == {1, 2, 4} and drawn(top_p=1.0) == {0, 1, 2, 3, 4}
    assert drawn(top_p=1e-9) == {1}
    assert drawn(top_k=3, top_p=0.7) == {1, 4}  # of the three that top_k leaves, two hold 7/9
    # equal logits: exactly k of them, not all
    assert len({sample(torch.zeros(9), temperature=1.0, top_k=3, generator=generator).item() for _ in range(99)}) == 3


def test_top_p_keeps_probabilities_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = keep_top_p(logits, 0.8)
    assert torch.isinf(kept[2:]).all()
    torch.testing.assert_close(kept.softmax(-1)[:2], torch.tensor([0.625, 0.375]))


# ---------------------------------------------------------------------------------------------------- text
TEXTS = (
    "Grüße, 東京から! 👩‍👩‍👧 and 🏳️‍🌈.",
    "  two spaces,\n\n\ttabs \n and an end  ",
    "中文，没有空格。日本語。한국어. עברית",
    "🙂🙂🙂",
    "naïve café #3:\n",
)


def pieces_of(tokenizer, ids) -> list[str]:
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids), ids
    assert all(pieces), "a piece is never empty"
    return pieces


@pytest.fixture(scope="module")
def fallback_json_dir(tmp_path_factory):
    """A `tokenizer.json` like Llama-2's: SentencePiece's spaces and byte-fallback pieces in Hugging Face's format."""
    import json

    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyzé", "▁th", "▁the", "in"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("i", "n")]
    vocab = {word: i for i, word in enumerate([*words, "▁t"])}
    tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("fallback")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(params=["bpe_dir", "spm_dir", "fallback_json_dir"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


def test_the_text_stream_equals_the_batch_decode_and_never_shows_half_a_character(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        pieces = pieces_of(tokenizer, ids)
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert "".join(pieces) == text
        # cut anywhere, as by --max_new_tokens, inside a character too
        for end in range(len(ids)):
            pieces_of(tokenizer, ids[:end])


def test_the_text_stream_equals_the_batch_decode_for_any_ids(tokenizer):
    """Random ids: broken UTF-8, special tokens between its bytes, byte pieces that spoil the ones before them."""
    rng = random.Random(0)
    byte_like = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).isascii()]
    for _ in range(300):
        pool = rng.choice([range(tokenizer.vocab_size), byte_like, [*byte_like[:40], *tokenizer.stop_ids, 10]])
        pieces_of(tokenizer, rng.choices(pool, k=rng.randint(0, 30)))


def test_ascii_text_is_shown_token_by_token(bpe_dir):
    tokenizer = Tokenizer(bpe_dir)
    ids = tokenizer.encode("the river runs and the light keeps the water")
    assert pieces_of(tokenizer, ids) == [tokenizer.decode([i]) for i in ids]


def test_a_stream_of_text_that_is_dropped_gives_the_model_back(bpe_dir):
    model = tiny_model(vocab_size=60)
    for _ in stream_text(Tokenizer(bpe_dir), generate(model, [1], max_new_tokens=40)):
        break
    assert model.training and model.transformer.h[0].attn.kv_cache is None
