"""Make a demo set without a download, from the documentation inside this Python.

Writes OUT/pretrain.jsonl (docstrings and help topics), OUT/sft.jsonl (questions with exact answers), OUT/dpo.jsonl
(an answer and a spoilt copy of it), OUT/lora.jsonl (who the model is) and OUT/meta.json. The same Python and the
same constants give the same bytes.

    python data/prepare_python_docs.py
    python data/prepare_python_docs.py OUT=/tmp/docs PER_TASK=100 AGAIN=True
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
LORA_ROWS = 60            # conversations about who the model is, at most 80
SYSTEM_SHARE = 0.05       # part of the sft conversations that open with a system turn
SKIPPED = ("site-packages", "test", "tests", "idlelib", "turtledemo", "encodings")  # folders of little prose

# Files whose contents are meant to be imported under another name.
PUBLISHED = {"_collections_abc": "collections.abc", "_pydatetime": "datetime", "_pydecimal": "decimal",
             "_pyio": "io", "genericpath": "os.path", "posixpath": "os.path"}


@dataclasses.dataclass
class Fact:
    """One module, class, function, method or property; `path` is its name inside the module."""
    module: str
    path: str
    kind: str
    doc: str
    args: str | None = None  # as written between the parentheses, without self; None = unknown
    bases: str = ""

    def __post_init__(self):
        self.full = self.path if self.path and self.module == "builtins" else f"{self.module}.{self.path}".strip(".")
        self.owner, _, self.name = self.full.rpartition(".")
        self.public = not re.search(r"(^|\.)_", self.full)


def clean(doc):
    """A docstring without its indentation and its copyright notices."""
    notice = r"Copyright (\(c\)|©|\d)|All Rights Reserved|hereby granted|Licensed (to|under)"
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc or ""))
    return "\n\n".join(p for p in paragraphs if not re.search(notice, p, re.I)).strip()


def parse(args):
    """The ast.arguments of a text such as `a, *, b=1`, or None where it is not Python."""
    with contextlib.suppress(SyntaxError):
        return ast.parse(f"def f({args}): pass").body[0].args


def parameters(args):
    """The ast.arg nodes of ast.arguments in order, and their default expressions (None = none) in the same order."""
    plain = args.posonlyargs + args.args
    pairs = list(zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults, strict=True))
    pairs += [(args.vararg, None)] + list(zip(args.kwonlyargs, args.kw_defaults, strict=True)) + [(args.kwarg, None)]
    return [(arg, default) for arg, default in pairs if arg]


def from_tree(node, module, owner=""):
    """The facts of all definitions below a node, those under `if` and `try` too, none from inside functions."""
    for child in ast.iter_child_nodes(node):
        path = f"{owner}.{getattr(child, 'name', '')}".lstrip(".")
        if isinstance(child, ast.ClassDef):
            inside = list(from_tree(child, module, path))
            start = next((fact for fact in inside if fact.path == f"{path}.__init__"), Fact("", "", "", ""))
            doc = f"{clean(ast.get_docstring(child))}\n\n{start.doc}".strip()
            yield Fact(module, path, "class", doc, start.args, ", ".join(map(ast.unparse, child.bases)))
            yield from (fact for fact in inside if fact is not start)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = {ast.unparse(mark).partition("(")[0].rpartition(".")[2] for mark in child.decorator_list}
            if marks & {"setter", "deleter"}:
                continue
            first = child.args.posonlyargs or child.args.args
            if owner and first and "staticmethod" not in marks:
                first.pop(0)
            kind, args = "method" if owner else "function", ast.unparse(child.args)
            if marks & {"property", "cached_property", "abstractproperty"}:
                kind, args = "property", None
            yield Fact(module, path, kind, clean(ast.get_docstring(child)), args)
        else:
            yield from from_tree(child, module, owner)


def from_source(root):
    """The facts of the modules below `root` that are written in Python, by full name; imports none of them."""
    facts, files = {}, []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not set(SKIPPED) & set(parts) and parts[-1] != "__main__" and all(part.isidentifier() for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            files.append((name.startswith("_"), name, path))  # a public file before the private one it stands for
    for _, name, path in sorted(files):
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
    args = None
    with contextlib.suppress(ValueError, TypeError):  # many compiled callables do not tell their signature
        found = inspect.signature(thing)
        bound = list(found.parameters.values())[inspect.ismethoddescriptor(thing):]
        args = str(found.replace(parameters=bound, return_annotation=found.empty))[1:-1]
        args = args if parse(args) else None
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield Fact(module, path, "class", clean(thing.__doc__), args, bases)
        for name in vars(thing):
            member = getattr(thing, name)
            if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                yield from from_object(module, f"{path}.{name}", member)
    elif inspect.isdatadescriptor(thing):
        yield Fact(module, path, "property", clean(thing.__doc__))
    else:
        yield Fact(module, path, "method" if "." in path else "function", clean(thing.__doc__), args)


def from_compiled(known):
    """The facts of the public members of compiled modules that are not among the `known`, by full name."""
    facts = {}
    extensions = ("array binascii cmath collections fcntl functools hashlib io math mmap operator os re select signal "
                  "socket ssl struct threading unicodedata zlib").split()
    for name in sorted({*extensions, *sys.builtin_module_names} - {"posix", "nt", "xxsubtype"}):
        if name.startswith("_"):
            continue
        with contextlib.suppress(ImportError):  # not every machine has all of them
            module = importlib.import_module(name)
            facts[name] = Fact(name, "", "module", clean(module.__doc__))
            for key, thing in vars(module).items():
                home = str(getattr(thing, "__module__", "")).lstrip("_")
                here = home == name or (name == "os" and home in ("posix", "nt"))
                if here and (inspect.isbuiltin(thing) or type(thing) is type) and Fact(name, key, "", "").full not in known:
                    facts |= {fact.full: fact for fact in from_object(name, key, thing) if fact.public}
    return {name: fact for name, fact in facts.items() if name not in known}


def document(fact):
    """A header that says what is documented, then the docstring."""
    call = f"{fact.full}({fact.args})"
    if fact.kind == "class":
        header = f"class {fact.full}({fact.bases})" + (f"\n{fact.name}({fact.args})" if fact.args else "")
        header = header.replace("()", "")
    else:
        header = call if fact.args is not None else f"{fact.kind} {fact.full}"
    return f"{header}\n\n{fact.doc}"


def summary(fact):
    """The first sentence of a docstring, "" where there is none that can stand alone."""
    paragraphs = fact.doc.split("\n\n")
    if re.match(r"[A-Za-z_][\w.]*\(", paragraphs[0]):  # compiled code often repeats the signature there
        paragraphs.pop(0)
    text = " ".join(paragraphs[0].split()) if paragraphs else ""
    found = re.match(r"(.+?[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?=\s+[A-Z`'\"(]|$)", text)
    text = found[1] if found else text
    fits = 15 <= len(text) <= MAX_ANSWER and text[0].isupper() and not re.search(r"[-=*~]{3}|>>>|::|:$", text)
    return text if fits else ""


def ask(fact, words):
    """All (task, question, answer) about a fact. `words` are a parameter name and a class or function to lie about."""
    full, name, kind, module, line = fact.full, fact.name, fact.kind, fact.module, summary(fact)
    rows = []

    def add(task, answer, *questions):
        rows.extend((task, question, answer) for question in questions if len(answer) <= MAX_ANSWER)
    if line:
        add("summary", line, f"In one line, what does the documentation say about {full}?", f"Summarise {full}.",
            f"Describe the {kind} {full} in one sentence.")
    if line and kind != "module":
        add("reverse", name, f'Which {kind} of module {module} is described as "{line}"?',
            f'I need the {kind} of {module} with this summary: "{line}" What is it called?')
    if kind in ("class", "function"):
        add("kind", kind, f"Is {name} a function or a class of module {module}?",
            f"In module {module}, is {name} a class or a function?")
        add("module", module, f"Which module defines the {kind} {name}?", f"From which module do I import {name}?")
        if line:
            add("module", module, f'Which module has a {kind} {name} that says "{line}"?')
    if kind in ("method", "property"):
        add("kind", kind, f"Is {full} a method or a property?")
        owner = fact.owner.removeprefix(module + ".")
        add("owner", owner, f"Which class of module {module} has the {kind} {name}?",
            f"In module {module}, {name} is a {kind} of which class?", f"Which class is {full} a {kind} of?")
    if fact.bases:
        add("base", fact.bases, f"What does the class {full} inherit from?", f"Name the bases of {full}.")
    tree = parse(fact.args) if fact.args is not None else None
    if tree and len(fact.args) <= MAX_ANSWER:
        found = parameters(tree)
        names = [arg.arg for arg, _ in found]
        add("signature", f"{name}({fact.args})", f"What is the signature of {full}?", f"How do I call {full}?",
            f"Write down {full} with its parameters.")
        add("parameters", ", ".join(names) or "none", f"What are the parameters of {full}?",
            f"List the parameter names of {full}.")
        add("count", str(len(names)), f"How many parameters does {full} take?")
        ...
    return rows
