"""The `bmtk` command.  A top-level module, so that `bmtk --help` runs without importing torch or bmtk."""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DESCRIPTION = """\
bmtk: pretrain, fine-tune and publish neural networks the Hugging Face way.

The first four commands run a recipe in one process. `accelerate launch recipes/NAME.py` runs the same recipe, with
the same options, on several devices.
"""
EPILOG = """\
example:
  bmtk pretrain --preset smoke                           a small language model, in seconds
  bmtk clean --config my.yaml                            filter raw text, with a report of what was removed
  bmtk prepare --config my.yaml                          tokenise the corpus of a pretraining run beforehand
  bmtk data show outputs/pretrain                        what a tokenised corpus holds, with samples
  bmtk data list                                         the data sets of the README, and which of them are here
  bmtk data get sst2                                     download one into data/sst2, as the configs name it
  bmtk tokenizer train --train_file my.txt --output_dir tokenizers/mine
  bmtk tokenizer show gpt2 --text_file my.txt            tokens a word, bytes a token, what it does not know
  bmtk finetune --preset smoke                           a classifier of texts, in seconds
  bmtk finetune --dataset rows.csv --output_dir mine     one of your own
  bmtk evaluate --model mine --test_file other.csv       its metrics on other rows
  bmtk predict --model mine --input new.csv              a label for each of new rows
  bmtk models                                            families, heads, presets and parameter counts
  bmtk convert microsoft/resnet-18 outputs/resnet-18     convert a model of transformers to bmtk
  bmtk info outputs/pretrain                             class, size and results of a model folder
  bmtk runs                                              the runs in outputs: how far, how well
  bmtk checkpoint verify outputs/pretrain                whether its checkpoints are whole
  bmtk verify resume --config my.yaml                    kill and resume that run, and compare
  bmtk verify parallel --config my.yaml                  the same run on 1 and 2 processes
  bmtk push outputs/pretrain user/my-model --dry-run     check it and list the files; nothing is sent
  hf auth login                                          once; or set HF_TOKEN
  bmtk push outputs/pretrain user/my-model --private     push it, load it back, compare outputs

next:
  `bmtk finetune --help` lists the options of a recipe, `bmtk push --help` what is sent and what never is. After
  `import bmtk` (or with trust_remote_code=True) anyone can load a published model by its name:
  AutoModelForCausalLM.from_pretrained("user/my-model").
"""
RECIPES = {
    "pretrain": "pretrain a new model, or continue with a pretrained one",
    "finetune": "fine-tune a model, or train a new one, for a task",
    "evaluate": "evaluate a trained model on labelled rows",
    "predict": "predict for new rows, images or recordings",
}
PREPARE = """\
usage: bmtk prepare [options of `bmtk pretrain`] [--prepare_workers N]

Read, check and tokenise the corpus of a pretraining run, without training.

`bmtk pretrain` does the same when it starts; do it beforehand where a corpus is large, where training runs on several
machines, or in order to look at the tokens first. Give the same settings to both:

  bmtk prepare --config my.yaml                          into <output_dir>/corpus
  bmtk prepare --config my.yaml --corpus_dir corpora/x   into a folder that several runs share
  bmtk data show corpora/x                               counts, packing, samples
  bmtk pretrain --config my.yaml --corpus_dir corpora/x  finds it, and trains

A corpus is written shard by shard (64 MiB of files each) by --prepare_workers processes; their number changes no byte
of the result. Interrupted at any point, the same command goes on at the shard; where nothing has changed it does
nothing; files that are added at the end cost only themselves. In a clone, `pip install -c constraints.txt '.[fast]'`
makes byte-level BPE several times as fast, with the same ids.

`bmtk pretrain --help data` lists the options about the corpus.
"""
DATA_SHOW = """\
Show what a tokenised corpus holds: documents, tokens, sources, packing, longest documents, sample rows.

DIR is a token store, a corpus folder, or the output_dir of a pretraining run.
"""
DATA_LIST = """\
List the data sets behind the results of the README: task, size, licence, and whether they are here.

  bmtk data list          all of them
  bmtk data list sst2     one: its files with their SHA-256, and where they come from
"""
DATA_GET = """\
Fetch a data set of the README into the folder that the configs name (data/NAME), so that a result can be repeated:

  bmtk data get sst2
  bmtk finetune --config recipes/configs/sequence_classification/sst2.yaml

Published files are downloaded to ~/.cache/bmtk (or $BMTK_CACHE), resumed where they break off, compared with the size
and SHA-256 that are known of them, and converted. The result takes its place when its rows are those that were
measured on. Read the licence in `bmtk data list` first: some of the data may be used for research only.
"""
TOKENIZER_TRAIN = """\
Train a tokenizer, save it for AutoTokenizer (bmtk is not needed to load it), and measure it.

`bmtk pretrain` trains one itself on its training text. Train it beforehand to compare kinds and sizes, to use one for
several models, or to add special tokens such as those of a chat:

  bmtk tokenizer train --train_file 'texts/*.jsonl.zst' --vocab_size 32768 --output_dir tokenizers/mine
  bmtk tokenizer train --train_file my.txt --kind unigram --special_tokens '<|user|>' '<|assistant|>' --output_dir t
  bmtk pretrain --train_file 'texts/*.jsonl.zst' --tokenizer tokenizers/mine

kinds:
  byte_bpe      byte-level byte-pair encoding, as of GPT-2 and Llama 3: any text, exactly. The usual choice
  unigram       pieces of bytes with probabilities; any text, exactly. Finer parts of words, where data are few
  wordpiece     as of BERT: words and "##" parts; blanks and ends of lines are lost. For encoders
  bytes         256 tokens: any language, with the longest rows
  char          a token for each character; for small alphabets, or Chinese
  word          what stands between blanks; for text that is tokenised already (Penn Treebank)
  uncased_word  lower-cased words, marks and Han characters; for classifiers of few rows

It is trained on a sample of at most --sample_mb MB, drawn from everywhere in the corpus, the same each time. What is
held out for validation (as `bmtk pretrain` does it, with the same --seed) is not trained on but measured on.
"""
TOKENIZER_SHOW = """\
Measure a tokenizer, a folder or a name on the Hub, on your text and on a page each of English and Chinese.

  bmtk tokenizer show tokenizers/mine --text_file held_out.txt
  bmtk tokenizer show gpt2 --text_file held_out.txt
"""
PUSH = """\
Publish the folder that a recipe or save_pretrained wrote.

Sent: weights (safetensors), config, tokenizer or processor, the model's own code, model card, report, run facts.
Never sent: optimizer state, checkpoints, corpora, training_args.bin, symbolic links, or any file that holds an access
token or a private key.

The pushed model is then loaded in a clean process without bmtk; the command reports success only if its outputs are
the same. The token comes from `hf auth login` or HF_TOKEN.
"""
CONVERT = """\
Convert a pretrained model of transformers to a bmtk model with the same weights and the same outputs.

MODEL is a folder or a name on the Hub: BERT, ConvNeXt, GPT-2, Llama, Mistral, Qwen2, Qwen3, ResNet, ViT.
Its tokenizer or image processor is saved with it. The outputs of both models are compared first. If a setting or
weight has no counterpart, the command names it and saves nothing.
"""
MODELS = """\
List the model families, the Auto classes that each supports, and the presets with their number of parameters.

Parameters are counted on the meta device, which allocates no memory, with the head of the published count.
"""
VERIFY_RESUME = """\
Kill your own run at random moments, resume it by the same command, and compare it with one that was left alone.

Both are the recipe itself, in processes of their own and in a new folder beside output_dir, with all settings of the
config but these: --steps optimizer steps, a checkpoint each quarter of them, every step in the history, no test rows,
nothing published. The kills (SIGKILL) come while it starts, trains, saves and ends; --seed draws the moments.

Exit code 0: histories, checkpoints and final weights are the same to the bit. Exit code 1: the first difference, with
step, file, tensor and size; the folders are kept then. If two runs that were left alone differ too, it is the machine.
"""
VERIFY_PARALLEL = """\
Run your own recipe on one process, on two, and (where it has fsdp_size) sharded over two, and compare them.

All have the same rows per optimizer step, precision fp32, and no dropout, whose random numbers depend on the number
of processes. Without two GPUs all run on the CPU. Compared are loss and gradient norm of each step, and the final
weights.

Exit code 0: they are the same within the bounds that are printed. Exit code 1: the first difference beyond them.
"""
RUNS = """\
List the training runs below a folder: recipe, task, model, steps, whether finished, last losses, best value of the
main metric on validation rows, checkpoints with their size, and health: damaged checkpoints (sizes against the
manifest; `bmtk checkpoint verify` reads them), steps that were not finite, what a kill has left unfinished.
"""
CHECKPOINT_VERIFY = """\
Check a checkpoint of either recipe, or all of a run: manifest, sizes and hashes, that the weights load by
from_pretrained and are finite, that the state of the optimizer fits them. Exit code 1: each damage is named.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, 1 for an error (reported on stderr), 2 for a usage error."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in RECIPES:  # has options of its own, --help among them
        return run_recipe(argv[0], argv[1:])
    if argv and argv[0] == "prepare":  # has those of the recipe for pretraining
        return run_prepare(argv[1:])
    if argv and argv[0] == "clean":  # reads a config file, as recipes do
        return run_clean(argv[1:])
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:
        return 0
    except Exception as error:
        return report(error, arguments.command)


def report(error: Exception, command: str) -> int:
    """Print what the user can mend in one line, and a fault of bmtk with its traceback; the exit status."""
    from bmtk.errors import fault_report, user_message

    message = user_message(error)
    print(fault_report(error) if message is None else f"bmtk {command}: {message}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bmtk", description=DESCRIPTION, epilog=EPILOG, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"bmtk {installed_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, purpose in RECIPES.items():
        commands.add_parser(name, help=purpose)
    commands.add_parser("prepare", help="read, check and tokenise the corpus of a pretraining run")
    commands.add_parser("clean", help="filter, repair and deduplicate raw text by the rules of a config file")
    add_data_commands(commands)
    add_tokenizer_commands(commands)
    add_run_commands(commands)
    add_verify_commands(commands)

    publishes = "publish a folder on the Hub and check that it loads"
    push = commands.add_parser("push", help=publishes, description=PUSH, formatter_class=plain)
    push.add_argument("directory", metavar="DIR", help="folder with config.json or adapter_config.json, and weights")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository as private")
    push.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to, created if it does not exist (default: main)"
    )
    push.add_argument("--message", default="Publish with bmtk", help="commit message (default: %(default)r)")
    push.add_argument("--dry-run", action="store_true", help="check the folder and list the files; send nothing")
    push.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the base model of an adapter run code of its own; only for code that you have read",
    )
    push.set_defaults(run=run_push)

    convert = commands.add_parser(
        "convert", help="convert a model of transformers to bmtk", description=CONVERT, formatter_class=plain
    )
    convert.add_argument("model", metavar="MODEL", help="folder or Hub name of a pretrained model")
    convert.add_argument("directory", metavar="DIR", help="new or empty folder to save to")
    convert.add_argument(
        "--auto-class",
        metavar="AUTO",
        help="convert only the part that this Auto class loads: AutoModel is the model without its head",
    )
    convert.set_defaults(run=run_convert)

    models = commands.add_parser(
        "models", help="list families, heads and presets", description=MODELS, formatter_class=plain
    )
    models.add_argument("--json", action="store_true", help="print JSON instead of tables")
    models.set_defaults(run=run_models)

    info = commands.add_parser(
        "info", help="show class, parameters and results of a saved model", formatter_class=plain
    )
    info.add_argument("directory", metavar="DIR", help="folder with config.json or adapter_config.json")
    info.set_defaults(run=run_info)
    return parser


def add_data_commands(commands: Any) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    data = commands.add_parser("data", help="get the data sets of the README, look at corpora", formatter_class=plain)
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = kinds.add_parser("show", help="show what one holds", description=DATA_SHOW, formatter_class=plain)
    show.add_argument("directory", metavar="DIR", help="token store, corpus folder or output_dir of a run")
    show.add_argument("--context-length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    show.add_argument("--samples", type=int, default=3, help="rows that are shown as text (default: %(default)s)")
    show.add_argument("--seed", type=int, default=0, help="which rows these are (default: %(default)s)")
    show.set_defaults(run=run_data_show)

    listed = kinds.add_parser(
        "list", help="list the data sets of the README", description=DATA_LIST, formatter_class=plain
    )
    listed.add_argument("name", metavar="NAME", nargs="?", help="one of them, for its sources and files")
    get = kinds.add_parser("get", help="fetch one of them", description=DATA_GET, formatter_class=plain)
    get.add_argument("name", metavar="NAME", help="as `bmtk data list` shows it")
    get.add_argument("--from", dest="given", metavar="DIR", help="folder with the published files, put there by hand")
    get.add_argument("--mirror", default="", metavar="URL", help="in place of https://raw.githubusercontent.com")
    for parser, run in ((listed, run_data_list), (get, run_data_get)):
        parser.add_argument("--folder", default="data", metavar="DIR", help="of all data sets (default: data)")
        parser.set_defaults(run=run)


def add_tokenizer_commands(commands: Any) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    tokenizer = commands.add_parser("tokenizer", help="train or measure a tokenizer", formatter_class=plain)
    kinds = tokenizer.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = kinds.add_parser("train", help="train one on a corpus", description=TOKENIZER_TRAIN, formatter_class=plain)
    train.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the tokenizer")
    train.add_argument("--kind", metavar="KIND", default="byte_bpe", help="see above (default: %(default)s)")
    train.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="tokens, at most (default: 4096)")
    train.add_argument("--special_tokens", nargs="+", default=[], metavar="TEXT", help="more beside <|endoftext|>")
    train.add_argument("--lower_case", action="store_true", help="read every text in lower case")
    train.add_argument("--with_mask", action="store_true", help="add <mask>, for masked language models")
    train.add_argument(
        "--sample_mb",
        type=int,
        default=100,
        metavar="N",
        help="10^6 bytes of text to train on, at most (default: 100)",
    )
    train.add_argument("--dataset", metavar="NAME", help="folder with splits, file, or name of a data set on the Hub")
    train.add_argument("--train_file", nargs="+", metavar="FILE", help="files, folders, patterns or URLs to train on")
    train.add_argument("--validation_file", nargs="+", metavar="FILE", help="text that is measured on")
    train.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        metavar="NUMBER",
        help="share of the text held out if there is no validation text; 0: none (default: 0.1)",
    )
    train.add_argument("--seed", type=int, default=42, help="which part is held out (default: %(default)s)")
    add_reading_options(train)
    train.set_defaults(run=run_tokenizer_train)

    show = kinds.add_parser("show", help="measure one", description=TOKENIZER_SHOW, formatter_class=plain)
    show.add_argument("tokenizer", metavar="NAME", help="folder or name on the Hub")
    show.add_argument("--text_file", nargs="+", metavar="FILE", help="files, folders, patterns or URLs to measure on")
    add_reading_options(show)
    show.set_defaults(run=run_tokenizer_show)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How texts are read: as the recipe for pretraining names it."""
    parser.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    parser.add_argument(
        "--sample_by", default="document", help="document or line: what is one text of .txt (default: %(default)s)"
    )
    parser.add_argument("--delimiter", metavar="TEXT", help="of .csv and .tsv; default: found in the file")
    parser.add_argument("--encoding", metavar="NAME", help="of text files; default: utf-8, or by a byte-order mark")
    parser.add_argument(
        "--on_corrupt", default="stop", help="stop or skip: what to do about rows that cannot be read (default: stop)"
    )


def add_run_commands(commands: Any) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    runs = commands.add_parser("runs", help="list runs and their health", description=RUNS, formatter_class=plain)
    runs.add_argument("folder", metavar="FOLDER", nargs="?", default="outputs", help="default: %(default)s")
    runs.add_argument("--json", action="store_true", help="print JSON instead of a table")
    runs.set_defaults(run=run_runs)

    checkpoint = commands.add_parser("checkpoint", help="look at checkpoints", formatter_class=plain)
    kinds = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    says = "check that one is whole and loads"
    verify = kinds.add_parser("verify", help=says, description=CHECKPOINT_VERIFY, formatter_class=plain)
    verify.add_argument("directory", metavar="DIR", help="checkpoint, or folder of a run: all of its checkpoints")
    verify.set_defaults(run=run_checkpoint_verify)


def add_verify_commands(commands: Any) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    verify = commands.add_parser("verify", help="prove that a run resumes, or runs in parallel", formatter_class=plain)
    kinds = verify.add_subparsers(title="commands", metavar="COMMAND", required=True)
    says = "kill and resume your own run, and compare it with one left alone"
    resume = kinds.add_parser("resume", help=says, description=VERIFY_RESUME, formatter_class=plain)
    add_recipe_options(resume, steps=12)
    resume.add_argument("--kills", type=int, default=4, metavar="N", help="how often (default: %(default)s)")
    resume.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    resume.set_defaults(run=run_verify_resume)
    says = "compare your own run on 1 and 2 processes"
    parallel = kinds.add_parser("parallel", help=says, description=VERIFY_PARALLEL, formatter_class=plain)
    add_recipe_options(parallel, steps=8)
    parallel.set_defaults(run=run_verify_parallel)


def add_recipe_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run")
    recipe = "the recipe that it is for (default: the one that its first lines name, or that has left it)"
    parser.add_argument("--recipe", choices=("pretrain", "finetune"), help=recipe)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each run (default: %(default)s)")
    work = "new or empty folder for the runs, which stays (default: one beside output_dir, deleted if all is well)"
    parser.add_argument("--work_dir", metavar="DIR", help=work)
    further = "after --, further options of the recipe: -- --learning_rate 1e-3"
    parser.add_argument("options", metavar="OPTION", nargs="*", help=further)


def installed_version() -> str:
    try:
        return version("big-model-toolkit")
    except PackageNotFoundError:
        return "(not installed: running from a folder)"


def run_recipe(name: str, argv: list[str]) -> int:
    """Run a recipe in this process, as `python recipes/NAME.py` does; it ends the process itself if it fails."""
    path = recipes_folder() / f"{name}.py"
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def run_prepare(argv: list[str]) -> int:
    """Prepare the data of a pretraining run; its settings are read by the recipe itself."""
    if argv in ([], ["-h"], ["--help"]):
        print(PREPARE, end="")
        return 0 if argv else 2
    print("loading PyTorch and transformers ...", file=sys.stderr, flush=True)
    path = recipes_folder() / "pretrain.py"
    sys.argv = [str(path), *argv]
    recipe = runpy.run_path(str(path), run_name="bmtk_prepare")
    from bmtk.process import clean_errors
    from bmtk.tasks import task_named
    from bmtk.training.dial import choose_vocabulary
    from bmtk.training.run_folder import check_data

    with clean_errors():
        run, data_args, args, dial, *_ = recipe["read_arguments"](argv)
        folder = Path(args.output_dir)
        data = task_named(run.task).read(data_args, seed=args.seed, folder=folder, **run.reading)
        choose_vocabulary(dial, data)
        check_data(folder, data, is_main=True)
        data.prepare(log=say)
        print("\n".join([*(f"note: {line}" for line in data.notes), *data.prepared()]))
    return 0


def run_clean(argv: list[str]) -> int:
    """Clean a corpus; torch is not needed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of datatrove for steps of a moment; read when tqdm is imported
    from bmtk.cleaning.command import clean, read_settings
    from bmtk.process import clean_errors

    with clean_errors():
        clean(read_settings(argv, recipes_folder()), log=say)
    return 0


def run_data_show(arguments: argparse.Namespace) -> int:
    from bmtk.data.store_report import mixture_report, report, stores_in

    stores = stores_in(Path(arguments.directory))
    print(mixture_report(stores[0].parent, context_length=arguments.context_length), end="")
    for directory in stores:
        print(
            report(
                directory,
                context_length=arguments.context_length,
                num_samples=arguments.samples,
                seed=arguments.seed,
            )
        )
    return 0


def run_tokenizer_train(arguments: argparse.Namespace) -> int:
    if not arguments.dataset and not arguments.train_file:
        print("bmtk tokenizer train: no text: set --train_file or --dataset", file=sys.stderr)
        return 2
    print("loading tokenizers and transformers ...", file=sys.stderr, flush=True)
    from bmtk.data.tokenizer_training import TokenizerPlan, train_folder

    names = ("kind", "vocab_size", "lower_case", "with_mask", "sample_mb", "seed")
    train_folder(
        text_source(arguments, arguments.train_file or [arguments.dataset], arguments.validation_file or []),
        TokenizerPlan(
            special_tokens=tuple(arguments.special_tokens),
            held_out=arguments.validation_fraction,
            **{name: getattr(arguments, name) for name in names},
        ),
        Path(arguments.output_dir),
        recipes_folder() / "data" / "languages",
        log=say,
    )
    return 0


def run_tokenizer_show(arguments: argparse.Namespace) -> int:
    print("loading tokenizers and transformers ...", file=sys.stderr, flush=True)
    from bmtk.data.tokenizer_training import show_tokenizer

    texts = text_source(arguments, arguments.text_file, []).read("train") if arguments.text_file else None
    samples = recipes_folder() / "data" / "languages"
    show_tokenizer(arguments.tokenizer, texts, samples, log=say)
    return 0


def text_source(arguments: argparse.Namespace, train: Sequence[str], validation: Sequence[str]) -> Any:
    from bmtk.data.text_files import TableFormat
    from bmtk.data.tokenizer_training import TextSource

    layout = TableFormat(arguments.delimiter, arguments.encoding)
    names = ("text_column", "sample_by", "on_corrupt")
    options = {name: getattr(arguments, name) for name in names}
    option = "dataset" if getattr(arguments, "dataset", None) and not arguments.train_file else "train_file"
    return TextSource(tuple(train), option, tuple(validation), layout=layout, **options)


def run_data_list(arguments: argparse.Namespace) -> int:
    from bmtk.data.named_downloads import details, listing, named

    folder = Path(arguments.folder)
    print("\n".join(details(named(arguments.name), folder) if arguments.name else listing(folder)))
    return 0


def run_data_get(arguments: argparse.Namespace) -> int:
    from bmtk.data.named_downloads import get, named

    get(
        named(arguments.name),
        Path(arguments.folder),
        places=recipes_folder() / "data" / "splits",
        given=Path(arguments.given) if arguments.given else None,
        mirror=arguments.mirror,
        log=say,
    )
    return 0


def run_verify_resume(arguments: argparse.Namespace) -> int:
    at_least_one(arguments, "steps", "kills")
    from bmtk.tools.verify_resume import verify_resume

    shared, recipe = {"steps": arguments.steps, "work_dir": arguments.work_dir, "log": say}, read_recipe(arguments)
    return verify_resume(recipe, kills=arguments.kills, seed=arguments.seed, **shared)


def run_verify_parallel(arguments: argparse.Namespace) -> int:
    at_least_one(arguments, "steps")
    from bmtk.tools.verify_parallel import verify_parallel

    return verify_parallel(read_recipe(arguments), steps=arguments.steps, work_dir=arguments.work_dir, log=say)


def read_recipe(arguments: argparse.Namespace) -> Any:
    print("loading PyTorch and transformers ...", file=sys.stderr, flush=True)
    from bmtk.tools.recipe_runs import Recipe

    further = {"recipes": recipes_folder(), "options": arguments.options}
    return Recipe.read(arguments.config, arguments.recipe, **further)


def at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raises: UserError for a number of steps or kills below 1."""
    from bmtk.errors import UserError

    for name in names:
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"{name}={value} must be at least 1")


def run_runs(arguments: argparse.Namespace) -> int:
    from bmtk.tools.runs import as_json, as_table, runs_below

    found = runs_below(arguments.folder)
    print(as_json(found) if arguments.json else as_table(found, below=arguments.folder))
    return 0


def run_checkpoint_verify(arguments: argparse.Namespace) -> int:
    from bmtk.tools.checkpoint_verify import checkpoints_in, report

    is_whole = True
    for folder in checkpoints_in(arguments.directory):
        lines, this_one = report(folder)
        say(lines)
        is_whole &= this_one
    if not is_whole:
        say("\nnext: resuming passes over damaged checkpoints; restore their files from a copy, or delete them")
    return 0 if is_whole else 1


def say(line: str) -> None:
    print(line, flush=True)


def recipes_folder() -> Path:
    """The recipes of a clone, beside this file; else those that are installed with the package."""
    beside = Path(__file__).parent / "recipes"
    installed = find_spec("bmtk_recipes")
    if (beside / "finetune.py").is_file() or installed is None or not installed.submodule_search_locations:
        return beside
    return Path(installed.submodule_search_locations[0])


def run_push(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from bmtk.hub.publish import PublishError, publish

    disable_progress_bar()
    try:
        publish(
            arguments.directory,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.message,
            dry_run=arguments.dry_run,
            trust_remote_code=arguments.trust_remote_code,
            log=say,
        )
    except PublishError as error:
        print(f"bmtk push: {error}", file=sys.stderr)
        return 1
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # missing weights are a warning in transformers, and an error here
    from bmtk.hub.convert import convert

    done = convert(arguments.model, arguments.directory, auto_class=arguments.auto_class)
    rows = {
        "converted": f"{done.source_class} -> {done.model_class}",
        "parameters": f"{done.num_parameters:,}",
        "largest difference": f"{done.difference:.1e} of the largest output, for one random input",
        "saved with it": ", ".join(done.processors) or "neither tokenizer nor image processor: the source has none",
        "folder": done.directory,
    }
    for name, value in rows.items():
        print(f"{name:20}{value}")
    print(
        f"\nnext, after `import bmtk`:\n  {done.auto_class}.from_pretrained({str(done.directory)!r})\n"
        f"or publish it:\n  bmtk push {done.directory} user/name --dry-run"
    )
    return 0


def run_models(arguments: argparse.Namespace) -> int:
    from bmtk.catalogue import catalogue, table

    found = catalogue()
    print(json.dumps(found, indent=2) if arguments.json else table(found))
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    from bmtk.tools.info import describe

    say(describe(arguments.directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
