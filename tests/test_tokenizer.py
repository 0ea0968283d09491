"""The tokenizer against transformers' on the same folders: ids, texts, and rendered conversations."""

import random
import shutil

import pytest
from helpers import CHATML, edit_json, sample_text, write_spm_tokenizer

from lit_gpt.files import read_json, write_json
from lit_gpt.tokenizer import Tokenizer

TEXTS = [
    "",
    "a",
    "the river",
    "The old house, and 12 stones.\n\nWhat is new?",
    "  two spaces\n\n\n   and three ",
    "naïve café 漢字 🙂",
    "tab\there\r\nand there",
    *sample_text(20, seed=5),
]
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "What is the river?"}],
    "an answer": [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "<b> & 'c' é "}],
    "a system and four turns": [
        {"role": "system", "content": "You are old."},
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "new.\n"},
    ],
}
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}{% set turns = messages %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') }}
    {% endif %}
    {% if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- if tools is not none and tools is defined %}{{- 'Environment: ipython' }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = """{%- set ns = namespace(found=false) -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.found = true %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{{- '[INST] ' ~ message.content ~ ' [/INST]' }}
    {%- else %}{{- message.content ~ eos_token }}{%- endif %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.found | tojson }} {{ {'text': messages[-1].content} | tojson(indent=1) }} {{ sep_token }}"""
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "zephyr": ZEPHYR, "mistral": MISTRAL}


def with_specials(source, folder, tokens, *, bos=None, tokenizer_class="PreTrainedTokenizerFast", **config):
    """A copy of a tokenizer.json folder with more special tokens, and with a post-processor that puts BOS in front."""
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as HFTokenizer

    shutil.copytree(source, folder)
    backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, **config)
    return folder


@pytest.fixture(scope="module")
def llama_3_dir(bpe_dir, tmp_path_factory):
    """Like Llama-3: BOS comes from the file's post-processor, a turn ends with a token of its own."""
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return with_specials(
        bpe_dir,
        tmp_path_factory.mktemp("llama3") / "model",
        tokens,
        bos="<|begin_of_text|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token=None,
        unk_token=None,
        chat_template=LLAMA_3,
    )


@pytest.fixture(scope="module")
def neox_dir(bpe_dir, tmp_path_factory):
    """Like Pythia: one token for everything, no BOS in front, no template."""
    return with_specials(
        bpe_dir,
        tmp_path_factory.mktemp("neox") / "model",
        ["<|padding|>"],
        tokenizer_class="GPTNeoXTokenizer",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        chat_template=None,
    )


@pytest.fixture(scope="module")
def folders(bpe_dir, spm_dir, llama_3_dir, neox_dir):
    """A folder of each kind, by its name."""
    return {"smollm": bpe_dir, "llama-2": spm_dir, "llama-3": llama_3_dir, "neox": neox_dir}


def oracle(folder):
    """transformers' tokenizer of the same folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("kind", ["smollm", "llama-2", "llama-3", "neox"])
def test_ids_and_texts_are_those_of_transformers(folders, kind):
    ours, theirs = Tokenizer(folders[kind]), oracle(folders[kind])
    assert ours.adds_bos == (kind in ("llama-2", "llama-3"))
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for text in TEXTS:
        if kind == "llama-2" and text.startswith(" "):
            continue  # the next test
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.mark.parametrize("kind", ["smollm", "llama-2", "llama-3", "neox"])
def test_decoding_gives_the_text_back(folders, kind):
    """Also a leading space of SentencePiece text, which transformers 5 drops."""
    tokenizer = Tokenizer(folders[kind])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_reads_special_tokens_in_a_text_as_transformers_does(tmp_path, legacy):
    write_spm_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", legacy=legacy)
    edit_json(tmp_path / "added_tokens.json", **{"<|im_start|>": 400, "<|im_end|>": 401})
    tokens = {str(i): {"content": t, "special": True, "normalized": False} for t, i in
              {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 400, "<|im_end|>": 401}.items()}  # fmt: skip
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=tokens)
    ours, theirs = Tokenizer(tmp_path), oracle(tmp_path)
    for text in ("<s>[INST] the [/INST]", "a</s>river</s>\nstone<s>12", "<|im_start|>user\nthe<|im_end|>\n"):
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
    assert ours.vocab_size == len(theirs) == 402
    assert ours.stop_ids == {2, 401}


def described(start: int = 400, **tokens: bool) -> dict:
    """An added_tokens_decoder with these tokens, by name, and whether each is special."""
    shared = {"lstrip": False, "rstrip": False, "single_word": False}
    return {
        str(i): {"content": f"<|{name}|>", "special": special, "normalized": not special, **shared}
        for i, (name, special) in enumerate(tokens.items(), start=start)
    }


ADDED = {  # what stands in tokenizer_config.json, and in added_tokens.json
    "described": ({"added_tokens_decoder": described(a=True, b=True)}, {}),
    "described, not special": ({"added_tokens_decoder": described(a=False, b=True)}, {}),
    "numbered": ({}, {"<|a|>": 400, "<|b|>": 401}),
    "numbered and named": ({"additional_special_tokens": ["<|a|>"]}, {"<|a|>": 400, "<|b|>": 401}),
    "named": ({"additional_special_tokens": ["<|a|>", "<|b|>"]}, {}),
    "a pad token": ({"pad_token": "<|a|>"}, {}),
}


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize("where", ADDED)
def test_tokens_that_other_files_add_are_those_of_transformers(request, tmp_path, kind, where):
    """They were split into pieces beside a tokenizer.json, and those that are not special vanished in decoding."""
    shutil.copytree(request.getfixturevalue(f"{kind}_dir"), tmp_path, dirs_exist_ok=True)
    before = Tokenizer(tmp_path).sha256
    config, numbered = ADDED[where]
    edit_json(tmp_path / "tokenizer_config.json", **config)
    if numbered:
        edit_json(tmp_path / "added_tokens.json", **numbered)
    ours, theirs = Tokenizer(tmp_path), oracle(tmp_path)
    assert ours.vocab_size == len(theirs) == (401 if where == "a pad token" else 402)
    assert ours.pad_id == theirs.pad_token_id
    for text in ("the river<|a|>the <|b|> house", "<|a|>\n<|b|>x<|a|> "):
        ids = theirs(text).input_ids
        assert 400 in ids and ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.sha256 != before, "data of one do not belong to the other"


SENTENCEPIECE = {  # what the model is trained with, and what stands in tokenizer_config.json
    "plain": ({}, {}),
    "added": ({}, {"added_tokens_decoder": described(a=True, b=False)}),
    "added, taking spaces along": (
        {},
        {"added_tokens_decoder": {k: v | {"rstrip": True} for k, v in described(a=True, b=True).items()}},
    ),
    "control symbols": ({"control_symbols": ["<|a|>", "<|b|>"]}, {}),
    "not named": ({}, {"bos_token": None, "eos_token": None, "unk_token": None}),
    "no space in front": ({}, {"add_prefix_space": False}),
}


def test_a_control_token_of_sentencepiece_takes_spaces_along_where_the_files_say_so(tmp_path):
    """Its own flags were written over, and one that a file calls not special was shown to the reader."""
    write_spm_tokenizer(tmp_path)
    end = {"2": {"content": "</s>", "special": False, "normalized": False, "rstrip": True}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=end)
    ours, theirs = Tokenizer(tmp_path), oracle(tmp_path)
    for text in ("</s>  the river", "the</s> \n12"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("number", [7, 900])
def test_a_sentencepiece_token_whose_id_is_not_the_one_that_is_stated_is_refused(tmp_path, number):
    write_spm_tokenizer(tmp_path)
    edit_json(tmp_path / "added_tokens.json", **{"</s>" if number == 7 else "<|a|>": number})
    with pytest.raises(ValueError, match=f"added_tokens.json says {number}: these files are not of one model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("case", SENTENCEPIECE)
def test_sentencepiece_around_special_tokens_gives_the_ids_of_transformers_and_the_text_back(tmp_path, case):
    """A space after a special token was lost where nothing came behind it; control symbols were split into pieces."""
    train, config = SENTENCEPIECE[case]
    write_spm_tokenizer(tmp_path, **train)
    edit_json(tmp_path / "tokenizer_config.json", **config)
    ours, theirs, rng = Tokenizer(tmp_path), oracle(tmp_path), random.Random(0)
    pieces = "<s>,</s>,<|a|>,<|b|>,<unk>, ,  ,   ,the,the river, house,\n,12,[INST],x.,é".split(",")
    texts = {"".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(200)}
    for text in (text for text in texts if not text.startswith(" ")):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        assert "taking" in case or ours.decode(ids, skip_special=False) == text


def test_sentencepieces_own_bos_and_eos_come_before_config_json(tmp_path):
    """First LLaMA folders name none, and config.json counts from 0: <s> was learned as the end of every answer."""
    write_spm_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="", eos_token="", unk_token="", add_bos_token=None)
    edit_json(tmp_path / "config.json", bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.eos_ids == tokenizer.stop_ids == {2}
    assert tokenizer.encode("<s></s>") == [1, 2]


@pytest.mark.parametrize("asks", [True, False, None])
def test_a_bos_that_only_tokenizer_config_asks_for_is_added(bpe_dir, tmp_path, asks):
    """As in transformers 4; version 5 believes tokenizer.json alone."""
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=asks)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.adds_bos == (asks is True)
    assert tokenizer.encode("the") == [1] * (asks is True) + tokenizer.encode("the", bos=False)


def test_files_that_give_a_token_two_ids_are_refused(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "added_tokens.json", **{"<|a|>": 405})
    with pytest.raises(ValueError, match=r"gives the token <\|a\|> the id 400, .*added_tokens.json says 405"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["smollm", "llama-2", "llama-3", "neox"])
def test_a_text_that_goes_on_continues_the_ids_of_the_text_before_it(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    before = "a river:"
    for text in ("The old house", " the house", "new\n\nthree"):
        joined = tokenizer.encode_batch([before])[0] + tokenizer.encode_batch([text], continues=True)[0]
        assert joined == tokenizer.encode(before + text, bos=False)


def test_a_sentencepiece_json_that_prepends_a_space_goes_on_without_it(tmp_path, spm_dir):
    """Llama-2's own tokenizer.json is of this kind."""
    oracle(spm_dir).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(spm_dir / "tokenizer_config.json", tmp_path)
    ours, sentencepiece = Tokenizer(tmp_path), Tokenizer(spm_dir)
    for text in ("The old house", " the house", "\n\nthree", "12", ""):
        assert ours.encode_batch([text], continues=True) == sentencepiece.encode_batch([text], continues=True)
        assert ours.encode(text) == oracle(tmp_path)(text).input_ids
    assert ours.encode_batch(["the"]) != ours.encode_batch(["the"], continues=True)


def test_bos_is_added_when_asked(spm_dir, neox_dir):
    tokenizer = Tokenizer(spm_dir)
    bare = tokenizer.encode("the", bos=False)
    assert tokenizer.encode("the", bos=True) == tokenizer.encode("the") == [1, *bare]
    assert Tokenizer(neox_dir).encode("the", bos=True)[0] == 0


def test_stop_ids_hold_every_end_that_the_files_and_the_vocabulary_name(llama_3_dir, tmp_path):
    shutil.copytree(llama_3_dir, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer(tmp_path)
    assert {tokenizer.decode([i], skip_special=False) for i in tokenizer.stop_ids} == {
        *("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")
    }
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, tokenizer.eos_id, 99999])
    assert Tokenizer(tmp_path).stop_ids == tokenizer.stop_ids | {7}


def test_special_ids_come_from_the_models_files_where_the_tokenizers_name_none(bpe_dir, tmp_path):
    shutil.copy(bpe_dir / "tokenizer.json", tmp_path)
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (None, None)
    with pytest.raises(ValueError, match="has no BOS token"):
        Tokenizer(tmp_path).encode("the", bos=True)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[2, 0], bos_token_id=1)
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (1, 2)
    edit_json(tmp_path / "special_tokens_map.json", eos_token={"content": "<|endoftext|>", "lstrip": False})
    assert Tokenizer(tmp_path).eos_id == 0


def test_a_token_that_is_null_is_none_whatever_the_models_files_say(bpe_dir, tmp_path):
    """Qwen's BOS: evaluation began texts with the id in generation_config.json, transformers with EOS."""
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    config = read_json(tmp_path / "tokenizer_config.json") | {"bos_token": None, "pad_token": None}
    write_json(tmp_path / "tokenizer_config.json", config)
    edit_json(tmp_path / "generation_config.json", bos_token_id=0, pad_token_id=1, eos_token_id=[2, 0])
    ours, theirs = Tokenizer(tmp_path), oracle(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 2, None)


def test_cutting_and_padding_stored_in_the_file_are_ignored(bpe_dir, tmp_path):
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the old house and the river"
    assert Tokenizer(tmp_path).encode(text) == Tokenizer(bpe_dir).encode(text)


def test_ids_beyond_the_vocabulary_decode_to_nothing(bpe_dir, spm_dir):
    for folder in (bpe_dir, spm_dir):
        tokenizer = Tokenizer(folder)
        assert tokenizer.decode([*tokenizer.encode("the"), 450]) == "the"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_render_as_in_transformers(bpe_dir, tmp_path, name, conversation, prompt):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=TEMPLATES[name])
    messages = CONVERSATIONS[conversation]
    expected = oracle(tmp_path).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert Tokenizer(tmp_path).render_chat(messages, add_generation_prompt=prompt) == expected


def test_chat_template_is_found_wherever_the_hub_keeps_it(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "tokenizer_config.json"
    edit_json(config, chat_template=[{"name": "rag", "template": "R"}, {"name": "default", "template": "D{{ 1 }}"}])
    assert Tokenizer(tmp_path).render_chat([]) == "D1"
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    messages = CONVERSATIONS["one question"]
    assert Tokenizer(tmp_path).render_chat(messages) == "J<|im_end|>"
    assert oracle(tmp_path).apply_chat_template(messages, tokenize=False) == "J<|im_end|>"


def test_a_template_may_ask_for_the_date(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') | int > 2000 }}")
    assert Tokenizer(tmp_path).render_chat([]) == "True"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{% for %}", "refuses the conversation: "),
        ("{{ messages[0].content.x.y }}", "has no attribute"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_clear_error(bpe_dir, tmp_path, template, message):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "the"}])
    assert str(tmp_path) in str(error.value)


def test_no_template_says_what_was_looked_for(spm_dir):
    with pytest.raises(ValueError, match=r"no chat template \(chat_template.jinja, or"):
        Tokenizer(spm_dir).render_chat([{"role": "user", "content": "the"}])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no tokenizer.model .*scripts/download.py"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: not a folder"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_corrupt_json_is_named(bpe_dir, tmp_path, name):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    good = (bpe_dir / "tokenizer.json").read_bytes()
    (tmp_path / name).write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=name):
        Tokenizer(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=name):
        Tokenizer(tmp_path)


def test_corrupt_sentencepiece_is_named(spm_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((spm_dir / "tokenizer.model").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tokenizer.model does not hold what it should"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer.model does not hold what it should"):
        Tokenizer(tmp_path)


def test_fingerprint_follows_the_file(bpe_dir, spm_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    assert Tokenizer(tmp_path).sha256 == Tokenizer(bpe_dir).sha256 != Tokenizer(spm_dir).sha256
