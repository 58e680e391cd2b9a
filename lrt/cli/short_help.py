"""What `lrt COMMAND --help` prints of a command with many flags: one screen. `--help-all` lists them all."""

from __future__ import annotations

import textwrap

from lrt.config.recipes import RECIPES

RECIPE_NAMES = f"\n{' ' * 28}".join(textwrap.wrap(", ".join(RECIPES), 50))
"""For descriptions, which begin in column 28."""
DECODING = """\
  --max-new-tokens N        most tokens to draw; --stop TEXT .. end it earlier
  --temperature X           0 is greedy; --seed N: the same seed, the same text
  --top-k N                 draw from the k most probable; --top-p X, --min-p X
  --repetition-penalty X    against repeated words; 1 is none
  --prefill MODE            exact, jacobi or interleaved-G, for a prompt
  --drafts N                tokens guessed ahead where the text repeats itself
  --weights KIND            full, or int8: faster steps
  --device NAME             auto, cpu or cuda"""
SHORT_HELP = {
    "train": f"""\
usage: lrt train [--recipe NAME] [--out FOLDER] [--data.source TEXT] [FLAGS]

Train a recipe on your text. Every field of a recipe is a flag; these are the
ones to begin with. lrt train --help-all lists all of them.

  --recipe NAME             {RECIPE_NAMES}
  --out FOLDER              the run's folder, and its name (runs/NAME)
  --resume RUN              go on with a run as it was, from its last checkpoint
  --or-resume               go on if --out holds a run already, else begin
  --init-from RUN           begin with the weights and tokenizer of this run
  --data.source TEXT        file, folder, glob, python, or hf:owner/name
  --data.tokenizer KIND     bytes, bpe, or a tokenizer's file or folder
  --data.vocab-size N       vocabulary of a bpe tokenizer
  --model.depth N           blocks; --model.width N channels
  --model.memory.projection none, gates, shared or layerwise
  --train.schedule NAME     parallel, interleaved-2, settled-1..3, ...
  --train.horizon WHEN      steps=1000, tokens=1e6, ratio=20 or compute=20
  --train.batch N           rows of a step; --train.length N positions of each
  --train.device NAME       auto, cpu or cuda; --train.seed N

lrt train --data.source book.txt --out runs/book""",
    "info": f"""\
usage: lrt info [RUN] [--recipe NAME] [--length N] [--json] [FLAGS]

What a model costs: parameters by group, FLOPs per token of every schedule,
bytes of cache. Of a run also how far it is trained, and its score.

  RUN                       run folder, or one of its checkpoints; or else
  --recipe NAME             {RECIPE_NAMES}
  --length N                positions of a row, for the FLOPs
  --json                    print one JSON object
  --model.depth N           blocks; --model.width N channels
  --model.memory.projection none, gates, shared or layerwise

Every field of the model is a flag: lrt info --help-all lists them.

lrt info pretrained/books
lrt info --recipe d12 --model.memory.projection layerwise""",
    "plan": f"""\
usage: lrt plan [--recipe NAME] [--cluster.devices N] [--json] [FLAGS]

What a recipe needs on a cluster, by formulas: memory, time and communication of
a step, and days, for DDP and FSDP. Nothing is run.

  --recipe NAME             {RECIPE_NAMES}
  --cluster.devices N       devices in all; --cluster.per-node N of a machine
  --cluster.memory BYTES    of a device, such as 80e9
  --cluster.flops N         peak FLOP/s of a device, such as 989e12
  --cluster.efficiency X    share of the peak that is reached, such as 0.4
  --cluster.within N        bytes/s between devices of a machine
  --cluster.across N        bytes/s between machines
  --train.batch N           rows of a step; --train.length N positions of each
  --train.horizon WHEN      steps=1000, tokens=1e6, ratio=20 or compute=20
  --json                    print one JSON object

Every field of a recipe is a flag: lrt plan --help-all lists them.

lrt plan --recipe d20_paper --cluster.devices 32""",
    "tokenize": """\
usage: lrt tokenize [--source TEXT] [--tokenizer KIND] [FLAGS]

Turn a text into token shards, as lrt train would, and print their folder. Flags
are those of lrt train, where data. stands before each.

  --source TEXT             file, folder, glob, python, or hf:owner/name;
                            several with commas: books/@0.7,code/@0.3
  --text-column NAME        of jsonl, parquet and Hugging Face datasets
  --tokenizer KIND          bytes, bpe, or a tokenizer's file or folder
  --vocab-size N            vocabulary of a bpe tokenizer
  --validation X            share of the documents that is held out
  --validation-source TEXT  hold this text out instead
  --max-bytes N             stop reading after so many bytes of text
  --normalised              take a tokenizer whose tokens lose some text
  --folder FOLDER           where the shards are kept; by default runs/data

lrt tokenize --help-all lists every flag.

lrt tokenize --source book.txt --tokenizer bpe --vocab-size 2048""",
    "eval": """\
usage: lrt eval RUN [--source TEXT] [--rows N] [--suite NAME] [FLAGS]

Bits per byte of a run on its validation text, in every mode; or a suite of
tasks, decoded with memory.

  RUN               run folder, or one of its checkpoints
  --source TEXT     score this text (file, folder, glob, hf:owner/name) instead
  --rows N          rows to score; --length N positions of each
  --schedule NAME   of the figures per pass; by default the one trained with
  --suite NAME      score core, blimp, parity, s5, mqar-8-8192, ... instead
  --bundle FOLDER   files of core or blimp; --lengths N .. of a synthetic task
  --tasks NAME ..   score tasks of lm-eval instead
  --mode MODE       of tasks: exact, jacobi, interleaved-G or zero_memory
  --limit N         examples of each task
  --weights KIND    full, or int8: large matrices in 8 bits
  --device NAME     auto, cpu or cuda
  --json            print one JSON object

lrt eval --help-all lists every flag.

lrt eval pretrained/books
lrt eval runs/parity --suite parity --lengths 64 256""",
    "core": """\
usage: lrt core RUN --bundle FOLDER [--limit N] [--mode MODE] [--out FOLDER]

CORE of a run, decoded with memory: lrt eval RUN --suite core in fewer words.

  RUN               run folder, or one of its checkpoints
  --bundle FOLDER   the published evaluation bundle (core.yaml,
                    eval_meta_data.csv, eval_data/) or the gauntlet's task files
  --limit N         items of each task; by default all
  --mode MODE       exact, jacobi, interleaved-G or zero_memory; by default
                    interleaved-8
  --out FOLDER      of the record, core-MODE.jsonl; by default RUN/suites
  --json            print one JSON object

lrt core --help-all lists every flag.""",
    "sample": f"""\
usage: lrt sample RUN [--prompt TEXT] [--samples N] [FLAGS]

Continue a prompt, decoding with memory; the text streams to standard output.

  RUN                       run folder, or one of its checkpoints
  --prompt TEXT             the beginning; - reads it from standard input
  --samples N               continuations, with seeds counting up
{DECODING}

lrt sample --help-all lists every flag.

lrt sample pretrained/books --prompt "It was"
lrt sample pretrained/books --prompt "It was" --samples 3 --temperature 0.7""",
    "chat": f"""\
usage: lrt chat RUN [--template TEXT] [FLAGS]

Talk to a model. Its state is kept between turns: nothing is taken in twice. A
model without a chat template goes on with the talk as text. In the chat, /help
lists what else there is.

  RUN                       run folder, or one of its checkpoints
  --template TEXT           what a turn becomes; {{}} stands for what you type
{DECODING}

lrt chat --help-all lists every flag.

lrt chat pretrained/books
lrt chat pretrained/books --template "{{}}" --temperature 0.7""",
    "convert": """\
usage: lrt convert SOURCE --out RUN [--memory KIND] [--context N] [FLAGS]

Make a run of another family's checkpoint, of an exported folder or of a run. A
memory can be added on the way.

  SOURCE               folder with config.json, safetensors and tokenizer (of
                       Llama, Mistral, Qwen2, Qwen3, an exported LRT), or a run
  --out RUN            folder of the new run
  --memory KIND        keep, none, residual, shared, layerwise; recirculation
                       needs no training
  --memory-source N    block after which the memory is taken
  --start KIND         zero: the function is unchanged; small or copy: nearly
  --share X            of recirculation: the memory's share of a block's input
  --tokenizer PATH     tokenizer folder or file, where the source has none
  --context N          longest sequence; by default the source's

lrt convert --help-all lists every flag.

lrt convert my-llama --out runs/llama --memory shared""",
    "serve": """\
usage: lrt serve RUN [--port N] [--host ADDRESS] [--api-key KEY ..] [FLAGS]

Serve a model: an OpenAI-compatible API, a page for writing, chat and a look
inside, and metrics.

  RUN                     run folder, or one of its checkpoints
  --port N                by default 8000; 0 takes any free one
  --host ADDRESS          by default only this machine can connect
  --name NAME             of the model; by default the run's
  --api-key KEY ..        ask for one of these; LRT_API_KEY hides them from ps
  --allowed-host NAME ..  names that browsers may call the server by
  --device NAME           auto, cpu or cuda; --threads N of a step
  --weights KIND          full, or int8: faster steps
  --rows N                answers that decode together; --queue N that may wait
  --max-prompt N          tokens of a prompt; --max-output N of an answer
  --deadline SECONDS      after which a request is given up
  --keep-mb N             memory for states of finished conversations, in MB
  --prefill MODE          exact, jacobi or interleaved-G, for long prompts

lrt serve --help-all lists every flag, docs/serving.md explains them.

lrt serve pretrained/books""",
    "bench train": f"""\
usage: lrt bench train [--recipe NAME] [--compile] [--json] [FLAGS]

Time training steps of every schedule against the plain transformer's.

  --recipe NAME             {RECIPE_NAMES}
  --depth N                 blocks; --width N channels; --vocab-size N
  --batch N                 rows of a step; --length N positions of each
  --schedules NAME ..       rows beside the plain one
  --repeats N               timed steps a row; the median counts
  --compile                 compile the blocks, the plain model's too
  --dtype NAME              auto, bfloat16 or float32
  --attention KIND          of strided passes: auto, masked or flex
  --no-memory               leave peak memory out, which takes a process a row
  --profile                 divide each step among its parts
  --device NAME             auto, cpu or cuda
  --json                    end with one JSON object

lrt bench train --help-all lists every flag.

lrt bench train --depth 4 --width 128 --schedules interleaved-2 settled-1""",
    "bench decode": f"""\
usage: lrt bench decode [--recipe NAME] [--checkpoint RUN] [--json] [FLAGS]

Milliseconds per token, with memory and without; with a run also prefill and
scoring against token by token.

  --recipe NAME             {RECIPE_NAMES}
  --checkpoint RUN          a trained model, for prefill and scoring
  --batches N ..            rows that decode together
  --contexts N ..           tokens already in the cache
  --lengths N ..            prompt lengths; --prompts N of each
  --modes MODE ..           ways of prefill, such as jacobi interleaved-8
  --source TEXT             take the prompts from this text
  --steps N                 timed pairs a figure; the median counts
  --no-compile              do not compile the step
  --device NAME             auto, cpu or cuda
  --json                    end with one JSON object

lrt bench decode --help-all lists every flag.

lrt bench decode --recipe d4 --no-compile --checkpoint pretrained/books""",
    "bench serve": """\
usage: lrt bench serve RUN [--clients N ..] [--seconds X] [--json] [FLAGS]

Serve a model and measure it: tokens per second, and time to the first token, by
number of clients.

  RUN               run folder, or one of its checkpoints
  --clients N ..    clients at the same time
  --tokens N        of every answer
  --seconds X       length of every measurement
  --load X          arrival rate of the open loop, as a share of the closed
  --rounds N        over all numbers of clients; the median counts
  --prompts N ..    lengths of prompts in tokens; --shared N .. of them the same
  --keep-mb N       memory for kept states, in MB; 0 keeps none
  --json            end with one JSON object

lrt bench serve --help-all lists every flag.

lrt bench serve pretrained/books --clients 1 8""",
}
"""By command, as its usage spells it. A test holds each to one screen, and each flag in it to the command's own."""
