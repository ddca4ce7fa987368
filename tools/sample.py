"""Fill in masks, generate texts, or turn texts into vectors.

    python tools/sample.py --out_dir=out/demo --text="The capital of France is [MASK]."
    python tools/sample.py --out_dir=out/demo < sentences.txt          one text a line
    python tools/sample.py --out_dir=out/demo --generate=1 --text="If the file" --show=1
    python tools/sample.py --out_dir=out/demo --embed=sentences.txt --to=embeddings.npy

Each [MASK] stands for one token. Prints the text with the likeliest tokens in place, and the
candidates for each mask with their probabilities. All masks of a text are filled from one forward
pass, independently of each other.

--generate=1 draws whole texts, as lib/generate.py explains: from the beginning of a document, or
behind the prompt --text. A prompt with [MASK]s has them filled by draws, and is continued if
--length says so. --text=- reads prompts from standard input, one a line. --show=1 shows how a text
fills. A causal model (objective=clm) continues the prompts, one token after the other; --show=1
streams them. --judge=RUN scores the texts with another run. Its pseudo-perplexity says something
only beside their entropy: a text that repeats itself is easy to predict.

--embed writes a float32 matrix with a row for each line, in their order; an empty line has a row
too. Texts longer than the model reads are cut and counted. Memory does not grow with the file. If
it is killed, the same command continues where it was and gives the same bytes.
"""

# ---- settings -----------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
text = ""  # text with [MASK] or, to generate, a prompt; empty: lines of standard input, no prompt
checkpoint = "auto"  # auto | best | last | PATH; auto: the best, or a newer one not yet evaluated
top = 5  # candidates to show for each mask
generate = False  # generate texts
length = 0  # tokens to generate behind the prompt; 0: what is left of the model's row
n_samples = 1  # texts to generate, for each prompt
sampler = "ancestral"  # ancestral: masks are filled in random order | confidence: likeliest first
steps = 64  # forward passes for a text, or for each block; at most one a token, which is best
temperature = 1.0  # below 1: likelier tokens, texts that repeat themselves; 0: always the likeliest
top_p = 1.0  # draw only from the likeliest tokens that together have this probability
top_k = 0  # draw only from so many of the likeliest tokens; 0: from all
block_tokens = 0  # fill blocks of so many tokens from left to right, any length; 0: all at once
seed = 1337  # of the draws; each number gives other texts
show = False  # watch each text fill; where there is no terminal, three moments are printed
judge = ""  # out_dir of another run that scores the texts; empty: none
embed = ""  # embed this file instead: a text a line, or .jsonl, .parquet with a field "text"
to = "embeddings.npy"  # where embeddings go; np.load(to, mmap_mode="r") reads them
pooling = "auto"  # max | concept_mean | concepts (all of them) | mean (of tokens), see lib/embed.py
batch_tokens = 4096  # tokens (or concepts) at once; texts in a batch have equal length, no padding
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -------------------------------------------------------------------------------
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

config = configure(globals())

# Before torch is imported: by default its CPU library keeps compiled kernels for 1,024 shapes,
# which are a GB here, where most shapes of batches occur once.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from lib.decoding import continue_texts
from lib.embed import choose_pooling, embed_file, embed_rows, rows_of, sha256_of
from lib.files import print_result
from lib.fill import fill_texts
from lib.generate import entropy
from lib.generate import generate as generate_texts
from lib.machine import DTYPES, choose_dtype, find_machine
from lib.run import load_run, user_mistakes
from lib.sampling import Sampling
from lib.settings import is_causal
from tools.pll import pseudo_perplexity
from tools.terminal import FillingText, StreamingText, printable

# Settings that one of the three tasks reads alone, and what asks for it.
FILLING = ("top",)
GENERATING = ("length", "n_samples", "sampler", "steps", "temperature", "top_p", "top_k",
              "block_tokens", "seed", "show", "judge")
EMBEDDING = ("to", "pooling")


def check_settings():
    """Raises ValueError for numbers out of range and for settings that would be ignored."""
    if min(top, batch_tokens, n_samples) < 1:
        raise ValueError(f"top={top}, batch_tokens={batch_tokens}, n_samples={n_samples}: "
                         "expected 1 or more")
    if embed and generate:
        raise ValueError("--embed and --generate=1 are two tasks; give one of them")
    uses = [(FILLING, "filling masks", "leave out --generate")] if generate else []
    if embed:
        uses += [(("text", *FILLING), "filling masks", "leave out --embed")]
    else:
        uses += [(EMBEDDING, "embedding", "name a file of texts with --embed=FILE")]
    if not generate:
        uses += [(GENERATING, "generating", "add --generate=1")]
    defaults = read_settings(__file__)
    for names, use, cure in uses:
        unused = [name for name in names if config[name] != defaults[name][0]]
        if unused:
            raise ValueError(f"{', '.join(unused)}: {use} only; {cure}")
    folder = os.path.dirname(to) or "."
    if embed and (not to.strip() or os.path.isdir(to) or not os.path.isdir(folder)):
        raise ValueError(f"--to={to!r}: expected a file in a folder that exists, as "
                         "--to=embeddings.npy")


# ---- filling masks ------------------------------------------------------------

def read_masked_texts():
    """The setting `text`, or the lines of standard input that are not empty."""
    if text:
        return [text]
    if sys.stdin.isatty():
        print("one text with [MASK] a line, end with Ctrl-D", file=sys.stderr)
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("no text; give --text='... [MASK] ...' or lines on standard input")
    return lines


def fill_and_print(texts):
    """Fills the masks of all texts and prints them -> for each a dict of text, filled and masks."""
    results = fill_texts(model, tok, texts, top, batch_tokens, machine.device)
    for result in results:
        print(f"{result['text']}\n  {result['filled']}")
        for candidates in result["masks"]:
            shown = [f"{c['token'].strip() or c['token']!r} {c['p']:.1%}" for c in candidates]
            print("    " + "  ".join(shown))
    return results


# ---- generating ---------------------------------------------------------------

def read_prompts():
    """The setting `text`, for "-" the lines of standard input. "": a text without a prompt."""
    prompts = [text]
    if text == "-":
        if sys.stdin.isatty():
            print("one prompt a line, end with Ctrl-D", file=sys.stderr)
        prompts = [line.strip() for line in sys.stdin]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip() and text:
            where = f"line {number} of standard input" if text == "-" else "--text"
            raise ValueError(f"{where} is an empty prompt: expected some text; without --text "
                             "documents are generated from their beginning")
    if not prompts:
        raise ValueError("no prompt on standard input: expected one a line")
    return prompts


def generate_and_print(prompts, sampling):
    """Generates n_samples texts for each prompt and prints them -> a summary."""
    samples, screen = [], None
    at_once = 1 if show else batch_tokens  # one text after the other is watched
    if is_causal(model):
        screen = StreamingText(tok) if show else None
        made = continue_texts(model, tok, prompts, n_samples, length, sampling, at_once,
                              machine.device, screen)
    else:
        screen = FillingText(tok) if show else None
        made = (sample for prompt in prompts for sample in generate_texts(
            model, tok, prompt, n_samples, length, sampling, at_once, machine.device, screen))
    for sample in made:
        if screen:
            screen.clear()
        if not isinstance(screen, StreamingText):  # which has printed it
            print(printable(sample.text))
        print("-" * 20)
        samples.append(sample)
    result = dict(texts=[sample.text for sample in samples],
                  tokens=sum(len(sample.ids) for sample in samples),
                  steps=max(sample.steps for sample in samples),
                  entropy=sum(entropy(sample.ids) for sample in samples) / len(samples))
    fewer = steps > result["steps"] and not block_tokens and not is_causal(model)
    print(f"{result['tokens']:,} tokens, {result['steps']:,} steps a text"
          + (f" (one a token, so fewer than steps={steps})" if fewer else "")
          + f", unigram entropy {result['entropy']:.2f} nats")
    return result


def load_judge():
    """-> model and tokenizer of the run `judge`."""
    model, judge_tok, _ = load_run(judge, machine.device)
    if is_causal(model):
        raise ValueError(f"--judge={judge} is a causal model; expected one trained with "
                         "objective=mlm, which masks one token after the other")
    for name, one in ((out_dir, tok), (judge, judge_tok)):
        if not one.has_text:
            raise ValueError(f"--judge reads texts, and the tokenizer of {name} knows ids only")
    return model, judge_tok


# ---- embedding ----------------------------------------------------------------

def embed_texts():
    """Embeds the file `embed` into `to` -> a summary."""
    setting, name = choose_pooling(pooling, model)

    def vectors(texts):
        rows, cut = rows_of(texts, tok, model.cfg.longest)
        found = embed_rows(model, rows, [name], batch_tokens, machine.device)
        return found[name].numpy(), cut

    # dtype, device and batch_tokens change the rounding, so they belong to the identity too.
    identity = dict(weights_sha256=sha256_of(loaded["model"]), tokenizer=tok.fingerprint,
                    pooling=setting, dtype=dtype, device=machine.device.type,
                    batch_tokens=batch_tokens)
    state = embed_file(embed, to, vectors, identity)
    made = state["identity"]
    print(f"{to}: {made['texts']:,} x {made['width']} float32, {setting} pooling; "
          f"{state['cut']:,} texts longer than {model.cfg.longest} tokens were cut, "
          f"{state['replaced']:,} held bytes that are not UTF-8")
    return dict(to=to, texts=made["texts"], width=made["width"], pooling=setting,
                cut=state["cut"], replaced=state["replaced"])


# ---- work ---------------------------------------------------------------------

with user_mistakes():
    check_settings()
    sampling = Sampling(sampler, steps, temperature, top_p, top_k, block_tokens, seed)
    prompts = read_prompts() if generate else []
    machine = find_machine(device)
    dtype, _ = choose_dtype(dtype, machine.device)
    model, tok, loaded = load_run(out_dir, machine.device, checkpoint)
    if is_causal(model) and not embed and not generate:
        raise ValueError(f"{out_dir} was trained with objective=clm and has no [MASK] to fill; "
                         "--generate=1 continues a text")
    model.freeze(DTYPES[dtype])
    if embed:
        try:
            print_result(embed_texts())
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where it was")
        sys.exit()
    if generate:
        judging = load_judge() if judge else ()
        result = generate_and_print(prompts, sampling)
        if judging:
            found = pseudo_perplexity(*judging, result["texts"], machine, dtype, batch_tokens)
            result |= dict(pseudo_perplexity=found, judge=judge)
            print(f"pseudo-perplexity {found or math.nan:.1f} a token of {judge}, to be compared "
                  "at equal entropy")
    else:
        results = fill_and_print(read_masked_texts())
        result = results[0] if text else results
print_result(result)
