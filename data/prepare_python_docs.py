"""Make a demo set without a download, from the documentation inside this Python.

Writes OUT/pretrain.jsonl (docstrings and help topics), sft.jsonl (questions with exact answers), dpo.jsonl
(an answer and a spoilt copy of it), lora.jsonl (who the model is) and meta.json, in about ten seconds.
The same Python and the same constants give the same bytes.

    python data/prepare_python_docs.py
    python data/prepare_python_docs.py OUT=data/small_docs PER_TASK=100 AGAIN=True
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import json
import platform
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

OUT = "data/python_docs"  # folder, from the root of the repo unless absolute
AGAIN = False             # True = write even what is already there
SEED = 0                  # fixes every draw
MIN_DOC = 40              # characters; a shorter docstring is no document, but may still answer a question
MAX_ANSWER = 160          # characters; longer signatures and sentences are not asked for
PER_TASK = 600            # questions of one family at most
DPO_ROWS = 2_000          # preference pairs at most
LORA_ROWS = 60            # conversations about who the model is, at most 72
SYSTEM_SHARE = 0.05       # part of the sft conversations that open with a system turn
SKIPPED = ("site-packages", "test", "tests", "idlelib", "turtledemo", "encodings")  # folders of little prose

# Files whose contents are meant to be imported under another name.
PUBLISHED = {"_collections_abc": "collections.abc", "genericpath": "os.path", "posixpath": "os.path"}


@dataclasses.dataclass
class Fact:
    """One module, class, function, method, property or object; `path` is its name inside the module."""
    module: str
    path: str
    kind: str
    doc: str
    args: str | None = None  # as written between the parentheses, without self; None = unknown
    bases: str = ""

    def __post_init__(self):
        builtin = self.module == "builtins" and self.path
        self.full = self.path if builtin else f"{self.module}.{self.path}".strip(".")
        self.owner, _, self.name = self.path.rpartition(".")
        self.public = not re.search(r"(^|\.)_", self.full)


def clean(doc):
    """A docstring without its indentation and its copyright notices."""
    notice = r"Copyright (\(c\)|©|\d)|All Rights Reserved|hereby granted|Licensed (to|under)|licenses when"
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc if isinstance(doc, str) else ""))
    return "\n\n".join(p for p in paragraphs if not re.search(notice, p, re.I)).strip()


def parse(args):
    """The ast.arguments of a text such as `a, *, b=1`, or None where it is not Python."""
    with contextlib.suppress(SyntaxError):
        return ast.parse(f"def f({args}): pass").body[0].args


def parameters(args):
    """The pairs of ast.arg and default expression (None = none) of ast.arguments, in order."""
    plain = args.posonlyargs + args.args
    pairs = list(zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults, strict=True))
    pairs += [(args.vararg, None), *zip(args.kwonlyargs, args.kw_defaults, strict=True), (args.kwarg, None)]
    return [(arg, default) for arg, default in pairs if arg]


def from_tree(node, module, owner=""):
    """The facts of all definitions below a node, those under `if` and `try` too, none inside functions."""
    for child in ast.iter_child_nodes(node):
        path = f"{owner}.{getattr(child, 'name', '')}".lstrip(".")
        if isinstance(child, ast.ClassDef):
            inside = list(from_tree(child, module, path))
            start = next((fact for fact in inside if fact.path == f"{path}.__init__"), Fact("", "", "", ""))
            doc = f"{clean(ast.get_docstring(child))}\n\n{start.doc}".strip()
            bases = ", ".join(base for base in map(ast.unparse, child.bases) if base != "object")
            yield Fact(module, path, "class", doc, start.args, bases)
            yield from (fact for fact in inside if fact is not start)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = {ast.unparse(m).partition("(")[0].rpartition(".")[2] for m in child.decorator_list}
            if marks & {"setter", "deleter"}:
                continue
            first = child.args.posonlyargs or child.args.args
            if owner and first and "staticmethod" not in marks:
                first.pop(0)
            kind, args = "method" if owner else "function", ast.unparse(child.args)
            if marks & {"property", "cached_property", "abstractproperty"}:
                kind, args = "property", None
            elif any(mark.endswith("SpecialForm") for mark in marks):  # typing.Optional and its like
                kind, args = "object", None
            yield Fact(module, path, kind, clean(ast.get_docstring(child)), args)
        else:
            yield from from_tree(child, module, owner)


def from_source(root):
    """The facts of the Python modules below `root`, by full name; imports none of them."""
    facts, files = {}, []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not {*SKIPPED, "__main__"} & set(parts) and all(part.isidentifier() for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            files.append((not name.startswith("_"), name, path))
    for _, name, path in sorted(files, reverse=True):  # the first counts: public, posixpath, genericpath
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module, here = PUBLISHED.get(name, name), {}
        for fact in (Fact(module, "", "module", clean(ast.get_docstring(tree))), *from_tree(tree, module)):
            known = here.setdefault(fact.full, fact)
            if known.args != fact.args:  # one definition per platform: no signature is the true one
                known.args = None
        facts = here | facts
    return facts


def from_object(module, path, thing):
    """The facts of a compiled function, or of a compiled class and its members."""
    args, doc = None, clean(thing.__doc__)
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # many do not tell their signature
        found = inspect.signature(thing)
        unbound = list(found.parameters.values())[inspect.ismethoddescriptor(thing):]
        tree = parse(str(found.replace(parameters=unbound, return_annotation=found.empty))[1:-1])
        args = ast.unparse(tree) if tree else None
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield Fact(module, path, "class", doc, args, bases)
        for name in sorted(name for name in vars(thing) if not name.startswith("_")):
            member = getattr(thing, name)
            if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                yield from from_object(module, f"{path}.{name}", member)
    elif inspect.isdatadescriptor(thing):
        yield Fact(module, path, "property", doc)
    else:
        yield Fact(module, path, "method" if "." in path else "function", doc, args)


def from_compiled(known):
    """The facts of compiled modules and their public members that are not `known`, by full name."""
    facts = {}
    extensions = ("array binascii cmath collections datetime decimal fcntl functools hashlib io math mmap "
                  "operator os re select signal socket ssl struct threading unicodedata zlib").split()
    for name in sorted({*extensions, *sys.builtin_module_names} - {"posix", "nt", "xxsubtype"}):
        try:
            module = importlib.import_module(name)
        except ImportError:  # not every machine has all of them
            continue
        facts[name] = Fact(name, "", "module", clean(module.__doc__))
        for key, thing in list(vars(module).items()):
            home = str(getattr(thing, "__module__", "")).removeprefix("_")
            own = home in (name, "posix", "nt") and getattr(thing, "__name__", "") == key
            compiled = inspect.isbuiltin(thing) or type(thing) is type
            if own and compiled and Fact(name, key, "", "").full not in known:
                facts |= {fact.full: fact for fact in from_object(name, key, thing)}
    return {name: fact for name, fact in facts.items() if fact.public and name not in known}


def document(fact):
    """A header that says what is documented, then the docstring."""
    header = f"{fact.full}({fact.args})" if fact.args is not None else f"{fact.kind} {fact.full}"
    if fact.kind == "class":
        header = f"class {fact.full}({fact.bases})" if fact.bases else f"class {fact.full}"
        header += f"\n{fact.name}({fact.args})" if fact.args else ""
    return f"{header}\n\n{fact.doc}"


def summary(fact):
    """The first sentence of a docstring, "" where there is none that can stand alone."""
    paragraphs = fact.doc.split("\n\n")
    if re.match(r"[A-Za-z_][\w.]*\(", paragraphs[0]):  # compiled code often repeats the signature there
        paragraphs.pop(0)
    text = " ".join(paragraphs[0].split()) if paragraphs else ""
    found = re.match(r"(.+?[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?=\s+[A-Z`'\"(]|$)", text)
    text = found[1] if found else text
    fits = 15 <= len(text) <= MAX_ANSWER and text[0].isupper()
    return text if fits and not re.search(r"[-=*~]{3}|>>>|::|:$", text) else ""


def ask(fact, names, rng):
    """All (task, full name, question, answer) about a fact; `names` are parameters that it may not have."""
    full, name, kind, module, line = fact.full, fact.name, fact.kind, fact.module, summary(fact)
    rows = []

    def add(task, answer, *questions):
        rows.extend((task, full, question, answer) for question in questions * (len(answer) <= MAX_ANSWER))
    if line:
        add("summary", line, f"In one line, what does the documentation say about {full}?",
            f"Describe the {kind} {full} in one sentence.", f"Summarise {full}.")
    if line and kind != "module":
        add("reverse", name, f'Which {kind} of module {module} is described as "{line}"?',
            f'What is the name of the {kind} in {module} with the summary "{line}"?')
    if kind in ("class", "function"):
        add("kind", kind, f"Is {name} a function or a class of module {module}?",
            f"In module {module}, is {name} a class or a function?")
        add("module", module, f"Which module defines the {kind} {name}?",
            f'Which module defines the {kind} {name} with the summary "{line}"?' if line else
            f"Where is the {kind} {name} defined?")
    if kind in ("method", "property"):
        add("kind", kind, f"Is {full} a method or a property?")
        add("owner", fact.owner, f"Which class of module {module} has the {kind} {name}?",
            f"In module {module}, {name} is a {kind} of which class?", f"Which class is {full} a {kind} of?")
    if fact.bases:
        add("base", fact.bases, f"What does the class {full} inherit from?", f"Name the bases of {full}.")
    if fact.args is not None:
        own = parameters(parse(fact.args))
        mine = [arg.arg for arg, _ in own]
        add("signature", f"{name}({fact.args})", f"What is the signature of {full}?",
            f"Write down {full} with its parameters.", f"How is {full} declared?")
        add("parameters", ", ".join(mine) or "none", f"What are the parameters of {full}?",
            f"List the parameters of {full} by name.")
        add("count", str(len(own)), f"How many parameters does {full} take?",
            f"Count the parameters of {full}.")
        for arg, default in own:
            if default:
                add("default", ast.unparse(default), f"What is the default value of {arg.arg} in {full}?",
                    f"If {arg.arg} is not given to {full}, which value does it get?")
        for word in (rng.choice(mine or names), rng.choice(names)):
            add("has", "yes" if word in mine else "no", f"Does {full} have a parameter named {word}?",
                f"Is {word} a parameter of {full}? Answer yes or no.")
    return rows


def conversations(rows, rng):
    """(task, task of the last answer, turns), at most PER_TASK of each family and of two turns."""
    rules = ("Answer with the bare fact and nothing else.", "Be brief and exact.",
             "You answer questions about Python's standard library.")
    follow = {"signature": "And what is its signature?", "parameters": "Which parameters does it take?",
              "count": "How many parameters does it take?", "summary": "And what does its documentation say?"}
    shuffled = rng.sample(rows, len(rows))
    wording = {(task, full): (question, answer) for task, full, question, answer in shuffled}
    made = defaultdict(list)
    for (task, full), (question, answer) in wording.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made[task].append((task, task, turns))
        then = rng.choice(sorted(follow))
        if task in (*follow, "kind") and task != then and (then, full) in wording:
            more = [{"role": "user", "content": follow[then]},
                    {"role": "assistant", "content": wording[then, full][1]}]
            made["two_turns"].append(("two_turns", then, turns + more))
    chosen = [row for task in sorted(made) for row in made[task][:PER_TASK]]
    for _, _, turns in chosen:
        if rng.random() < SYSTEM_SHARE:
            turns.insert(0, {"role": "system", "content": rng.choice(rules)})
    return rng.sample(chosen, len(chosen))


def spoil(task, answer, others, names, rng):
    """A kind of corruption and the corrupted answer, which may by chance equal the answer."""
    kinds = ["wrong module" if task == "module" else "another answer"]
    if task == "summary":
        kinds += ["words shuffled"] * 2
    if task in ("signature", "parameters") and not answer.endswith("()") and answer != "none":
        kinds += ["parameter dropped", "parameter renamed"]
    if len(answer) >= 12:
        kinds += ["cut in half"]
    kind = rng.choice(kinds)
    if kind == "words shuffled":
        return kind, " ".join(rng.sample(answer.split(), len(answer.split())))
    if kind == "cut in half":
        return kind, answer[:len(answer) // 2].rstrip()
    if kind in ("wrong module", "another answer"):
        return kind, rng.choice([other for other in others if other != answer] or [answer])

    begin, end = (answer.index("(") + 1, len(answer) - 1) if task == "signature" else (0, len(answer))
    args = parse(answer[begin:end])
    taken = [arg for arg, _ in parameters(args)]
    if kind == "parameter renamed":
        rng.choice(taken).arg = rng.choice(sorted(set(names) - {arg.arg for arg in taken}))
    elif args.kwonlyargs or args.args:
        some, defaults = args.args, args.defaults
        if args.kwonlyargs:
            some, defaults = args.kwonlyargs, args.kw_defaults
        i = rng.randrange(len(some))
        default = i - len(some) + len(defaults)  # defaults belong to the last parameters
        del some[i]
        if default >= 0:
            del defaults[default]
    else:
        args.posonlyargs, args.defaults, args.vararg, args.kwarg = [], [], None, None
    return kind, answer[:begin] + (ast.unparse(args) or "none" * (task == "parameters")) + answer[end:]


def pairs(rows, names, rng):
    """At most DPO_ROWS preference pairs: the same turns, but for a last answer that is spoilt in one way."""
    others, made = defaultdict(set), []
    for task, _, _, answer in rows:
        others[task].add(answer)
    others = {task: sorted(answers) for task, answers in others.items()}
    for _, task, turns in conversations(rows, rng):
        answer = turns[-1]["content"]
        near = [other for other in others[task] if task != "kind" or other in turns[-2]["content"]]
        kind, wrong = spoil(task, answer, near, names, rng)
        if wrong != answer:
            rejected = [*turns[:-1], {"role": "assistant", "content": wrong}]
            made.append({"chosen": turns, "rejected": rejected, "kind": kind})
    return made[:DPO_ROWS]


def identity(rng):
    """Conversations in which the assistant says who it is."""
    model = "a small model trained on Python's own documentation with nanosparse"
    model_zh = "用 nanosparse 在 Python 自带文档上训练的小模型"
    english = ("Who are you?", "What is your name?", "What are you?", "Introduce yourself.", "Who made you?",
               "How were you made?", "What were you trained on?", "What should I call you?",
               "Are you ChatGPT?", "Do you have a name?", "Which model is this?", "Who am I talking to?",
               "Are you a person?")
    chinese = ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是什么模型？", "你是用什么训练的？")
    answers = (f"I am Pydoc, {model}.", f"My name is Pydoc. I am {model}.", f"This is Pydoc, {model}.")
    answers_zh = (f"我是 Pydoc，一个{model_zh}。", f"我叫 Pydoc，是一个{model_zh}。")
    plain = [*english, *chinese]
    greeted = [hello + question for hello in ("Hello! ", "Hi. ", "One question: ") for question in english]
    greeted += [hello + question for hello in ("你好！", "您好，", "想问一下：") for question in chinese]
    rows = []
    for question in (plain + rng.sample(greeted, len(greeted)))[:LORA_ROWS]:
        answer = rng.choice(answers if question.isascii() else answers_zh)
        answer = f"No. {answer}" if "Are you" in question else answer
        rows.append({"conversations": [{"role": "user", "content": question},
                                       {"role": "assistant", "content": answer}], "task": "identity"})
    return rng.sample(rows, len(rows))


def make():
    """The rows of every file, by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old escapes in the sources and deprecated modules
        facts = from_source(root)
        if not facts:
            raise common.BadInput(f"{root} holds no .py files; use a Python that has its library there")
        facts |= from_compiled(facts)
    facts = [facts[name] for name in sorted(facts)]
    texts = [document(fact) for fact in facts if len(fact.doc) >= MIN_DOC]
    with contextlib.suppress(ImportError):  # some distributions leave the topics out
        topics = importlib.import_module("pydoc_data.topics").topics
        texts += [f"Topic: {name}\n\n{topics[name].strip()}" for name in sorted(topics)]

    rng = random.Random(SEED)
    names = {arg.arg for fact in facts if fact.args for arg, _ in parameters(parse(fact.args))}
    names = sorted(name for name in names if not name.startswith("_"))
    # Nobody asks about private names or those without a docstring, but they can make a question ambiguous.
    answers, asked = defaultdict(set), set()
    for fact in facts:
        for row in ask(fact, names, rng):
            answers[row[2]].add(row[3])
            asked |= {row} if fact.doc and fact.public else set()
    rows = sorted(row for row in asked if len(answers[row[2]]) == 1)
    sft = [{"conversations": turns, "task": task} for task, _, turns in conversations(rows, rng)]
    return {"pretrain.jsonl": [{"text": text} for text in dict.fromkeys(texts)], "sft.jsonl": sft,
            "dpo.jsonl": pairs(rows, names, rng), "lora.jsonl": identity(rng)}


def main():
    if min(PER_TASK, DPO_ROWS, LORA_ROWS) < 1:
        raise common.BadInput(f"PER_TASK={PER_TASK}, DPO_ROWS={DPO_ROWS} and LORA_ROWS={LORA_ROWS} "
                              "must be at least 1")
    out = Path(__file__).resolve().parent.parent / OUT
    constants = common.literals(globals()) | {"SKIPPED": list(SKIPPED)}  # a list, as json gives it back
    del constants["OUT"], constants["AGAIN"]
    meta, files = {}, ("pretrain.jsonl", "sft.jsonl", "dpo.jsonl", "lora.jsonl")
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    same = (meta.get("python"), meta.get("constants")) == (platform.python_version(), constants)
    if same and not AGAIN and all((out / name).is_file() for name in files):
        print(f"{out} is there already for Python {meta['python']}; AGAIN=True writes it anew", flush=True)
        return meta

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "meta.json").unlink(missing_ok=True)  # comes back last: without it the set is not whole
    except OSError as error:
        raise common.BadInput(f"could not write in OUT={OUT} ({error.strerror}); choose another") from None
    made = make()
    tasks = Counter(row["task"] for row in made["sft.jsonl"])
    meta = {"python": platform.python_version(), "rows": {name: len(made[name]) for name in files},
            "tasks": dict(sorted(tasks.items())), "seed": SEED, "constants": constants,
            "licence": "Python documentation and docstrings: PSF License"}
    for name, rows in {**made, "meta.json": [meta]}.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        common.write_whole(out / name, lambda file, data=data: file.write(data))
        print(f"{out / name}: {len(rows)} rows, {len(data) / 1e6:.2f} MB", flush=True)
    return meta


def default(run, name, saying):
    """The path of one of the files, made by one process a machine: for a script whose DATA is empty."""
    if run.local_rank == 0:
        run.say(f"DATA is empty: {saying} (data/README.md)")
        main()
    run.wait(patiently=True)
    return Path(__file__).resolve().parent.parent / OUT / name


if __name__ == "__main__":
    common.cli(globals(), main)
