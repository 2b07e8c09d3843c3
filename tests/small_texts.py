"""Texts of single letters in the format of the true ones, and a base that reads a letter as a token.

A document says of every few tokens which one it is: category's letter and four digits, again and again.
"""

import lzma

import torch
from pyarrow import Table, parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from umbel.tasks import texts

END, PAD = 0, 1
LINES = 300  # of what is told apart in fiftieths
LANGUAGES = ("cs", "de", "en", "fr")
XQUAD = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
LETTERS = dict(zip(("cs", "de", "en", "fr"), "cdef", strict=True))


def document(letter, number, times=6):
    return f"{letter}{number:04d}" * times


def write_texts(folder):
    """Puts the texts into the folder's `text`."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)

    def write(name, rows):
        parquet.write_table(Table.from_pylist(rows), text / f"{name}.parquet")

    write("multi30k", [{lang: document(LETTERS[lang], n) for lang in LANGUAGES} for n in range(600)])
    paragraphs = [
        {"lang": lang, "ctx": n, "title": f"t{n // 5}", "context": document("abcdefghijkl"[at], n)}
        for at, lang in enumerate(XQUAD)
        for n in range(100)
    ]
    write("xquad_contexts", paragraphs)
    write("xquad_qa", [{"lang": row["lang"], "ctx": row["ctx"], "question": "who " * 9} for row in paragraphs])
    write("python_stdlib_code", [{"code": document("p", n, 9)} for n in range(150)])
    for part, split in enumerate(("valid", "test")):
        articles = (f" = A{n} = \n {document('w', n, 9)} \n" for n in range(75 * part, 75 * part + 75))
        (text / f"wikitext2_{split}.txt.xz").write_bytes(lzma.compress("\n".join(articles).encode()))
    news = [{"label": n % 4, "title": "", "text": document("wsbt"[n % 4], n)} for n in range(800)]
    write("ag_news", news)
    spoken = [
        {"play": "p", "role": f"R{role}", "ord": n, "speech": document("abc"[role], n, 6 - role)}
        for role in range(3)
        for n in range(80)
    ]
    write("shakespeare_by_role", spoken)
    write("glue", [*glue_rows()])
    kinds = ("brainstorming", "open_qa", "closed_qa", "classification", "creative_writing", "general_qa")
    kinds += ("information_extraction", "summarization")
    write(
        "dolly15k",
        [
            {
                "instruction": f"say {n}",
                "context": f"c{n // 16} " * 5 * (n % 3 > 0),  # two of a category may have the same, and others
                "response": f"r{n}!",
                "category": kinds[n % 8],
            }
            for n in range(480)
        ],
    )
    write("feddpa_flan", [*flan_rows()])
    rest = {
        "newsgroups20": ("subject", "body"),
        "stackoverflow_titles": ("title",),
        "gsm8k": ("question", "answer"),
    }
    rest |= {"code_alpaca": ("instruction", "input", "output"), "python_problems": ("prompt", "code")}
    for name, columns in (rest | {"clinc150": ("text",)}).items():
        write(name, [{column: f"{name} {column} {n} " * 3 for column in columns} for n in range(40)])
    write(
        "udhr",
        [
            {"code": code, "text": "\n".join(document("abcdefghijklmno"[at], n) for n in range(LINES))}
            for at, code in enumerate(texts.DECLARATION_CODES.values())
        ],
    )
    write(
        "genesis_en_fr_de_sv",
        [
            {"lang": lang, "version": version, "text": document(LETTERS[lang], n)}
            for lang, version in [*texts.VERSE_VERSIONS.items(), ("en", "another")]
            for n in range(LINES)
        ],
    )


def glue_rows():
    for name, pair in (("cola", 0), ("mrpc", 1), ("qnli", 1), ("rte", 1), ("sst2", 0)):
        for split, count in (("train", 0 if name == "qnli" else 120), ("dev", 60)):
            for n in range(count):
                linked = name == "qnli"  # a question is there twice, and of four rows two share a sentence
                second = f"{name[1]}{split}{n - (linked and n % 4 == 2)}" if pair else ""
                yield {
                    "task": name,
                    "split": split,
                    "sentence1": f"{name[0]}{split}{n // 2 if linked else n}",
                    "sentence2": second,
                    "label": n % 2.0,
                }


def flan_rows():
    for number in (1, 2):
        for client in range(8):
            for split, count in (("train", 30), ("test", 20)):
                for n in range(count):
                    yield {
                        "dataset": number,
                        "split": split,
                        "category": f"kind{client}",
                        "instruction": f"{number}{split} {client}-{n}?",
                        "output": f"<{client}-{n}>",
                    }


def tokenizer():
    """One token for each byte; 0 is the end's, 1 padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<end>", "<pad>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")


def write_base(folder):
    """A GPT-2 with first weights and its tokenizer."""
    config = GPT2Config(
        vocab_size=258, n_embd=8, n_layer=1, n_head=1, n_positions=256, eos_token_id=END, pad_token_id=PAD
    )
    config.bos_token_id = END
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_vit(folder, size=32):
    """A vision transformer with first weights, of images of `size` pixels."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=size,
        patch_size=size // 4,
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)
