"""Read from our code which calls of AWS a role makes, and which IAM actions these need.

There is one door to AWS, and every call through it is written `client("service").method`, with both names as they are.
That can be read from the syntax tree. `ENTRY_POINTS` says where the code of a role begins: a function, or a method of a
class. From there the reader follows names through our own modules for AWS.
"""
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import intel_nb
from intel_nb.aws.client import service_model
from intel_nb.aws.permissions import Role

PACKAGE = Path(intel_nb.__file__).parent


def methods(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


GROUP, HOSTING = "aws.package_group:PackageGroup", "aws.hosting:SageMakerEndpoints"
ENTRY_POINTS = {
    "Job": methods(GROUP, "champion", "package", "predictions"),
    "Registrar": methods(GROUP, "evaluation", "versions"),
    "Watch": ("aws.capture:run_drift_job",),
    "Build": ("aws.stages:run_modelbuild",),
    "Deploy": ("aws.stages:run_deploy_step",
               *methods(GROUP, "get", "versions", "package", "predictions", "set_alias", "set_tag"),
               *methods(HOSTING, "deploy", "describe", "history", "rollback"), "aws.hosting:invoke_endpoint",
               "aws.hosting:endpoint_drift_status",
               "aws.objects:download"),
    "Operator": (*(f"aws.commands:{name}" for name in (
                     "run_pipeline", "show_status", "approve_version", "promote_version", "reject_version",
                     "rollback_version", "stage_url", "show_log")), "aws.hosting:invoke_endpoint",
                 *methods(GROUP, "versions", "set_status"),
                 *methods(HOSTING, "list", "describe", "rollback", "start", "stop")),
}


class Call(NamedTuple):
    "A call of a service."
    service: str
    method: str


def calls_in(node: ast.AST) -> set[Call]:
    'Return the calls that are written as `client("service").method` somewhere in `node`, made or passed on.'
    return {Call(inner.value.args[0].value, inner.attr) for inner in ast.walk(node)
            if isinstance(inner, ast.Attribute) and is_client(inner.value)}


def is_client(node: ast.AST) -> bool:
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "client"
            and bool(node.args) and isinstance(node.args[0], ast.Constant))


Place = tuple[str, str]  # a module, and a function, a class or a method in it


@dataclass
class Module:
    "A module's functions and methods by name, and the places that its names stand for."
    name: str
    defined: dict[str, ast.AST] = field(default_factory=dict)
    names: dict[str, Place] = field(default_factory=dict)


@lru_cache(maxsize=64)
def read_module(name: str) -> Module:
    "Return the module `aws.…` of the package."
    found, tree = Module(name), ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.defined[node.name] = node
            found.names[node.name] = (name, node.name)
        if isinstance(node, ast.ClassDef):
            found.defined |= {f"{node.name}.{inner.name}": inner for inner in node.body
                              if isinstance(inner, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.names |= imported(node)
    return found


def imported(node: ast.ImportFrom) -> dict[str, Place]:
    "Return what an import brings from our modules for AWS: a module, or a name in one."
    path = (node.module or "").removeprefix("intel_nb").lstrip(".")
    if node.level == 1 or path.startswith("aws"):
        inside = path if path.startswith("aws") else f"aws.{path}".rstrip(".")
        return {(a.asname or a.name): (f"aws.{a.name}", "") if inside == "aws" else (inside, a.name)
                for a in node.names}
    return {}


def uses(module: Module, node: ast.AST, owner: str = "") -> Iterator[Place]:
    "Yield the places in our modules that `node` uses; `owner` is its class if it is a method."
    kinds = dict(constructed(node)) | ({"self": owner} if owner else {})
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id in module.names:
            yield module.names[inner.id]
        if isinstance(inner, ast.Attribute):
            where, what = module.names.get(owner_name(inner.value, kinds), ("", ""))
            yield where, f"{what}.{inner.attr}" if what else inner.attr


def constructed(node: ast.AST) -> Iterator[tuple[str, str]]:
    "Yield the variables in `node` that a call of a plain name makes, as in `registry = PackageGroup(name)`."
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign):
            target, value = inner.targets[0], inner.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for one, made in zip(target.elts, value.elts) if both else [(target, value)]:
                if isinstance(one, ast.Name) and isinstance(made, ast.Call) and isinstance(made.func, ast.Name):
                    yield one.id, made.func.id


def owner_name(node: ast.AST, kinds: Mapping[str, str]) -> str:
    "Return the name of the class or the module that `node` stands for."
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id
    return kinds.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def calls_from(entry_points: Iterable[str]) -> set[Call]:
    "Return all calls that may be made from `entry_points`, each an `aws.module:function` or `aws.module:Class.method`."
    todo, seen, found = [tuple(entry.split(":")) for entry in entry_points], set(), set()
    for where, what in todo:
        if what not in read_module(where).defined:
            raise LookupError(f"intel_nb.{where} has no {what}; correct ENTRY_POINTS")
    while todo:
        where, what = todo.pop()
        if (where, what) in seen or not where.startswith("aws.") or where == "aws.client":
            continue
        seen.add((where, what))
        module = read_module(where)
        node, owner = module.defined.get(what), what.rpartition(".")[0]
        if node is None or isinstance(node,
                                      ast.ClassDef):  # a class as such makes no call; its methods are read one by one
            todo += [(where, f"{what}.__init__")] if node is not None else []
            continue
        found |= calls_in(node)
        todo += uses(module, node, owner)
    return found


PREFIX = {"sagemaker-runtime": "sagemaker"}
ACTIONS = {  # where an action is not called as the service's model calls the operation
    Call("sts", "get_caller_identity"): (),  # everybody may ask who they are
    Call("s3", "list_objects_v2"): ("s3:ListBucket",),
    Call("s3", "head_bucket"): ("s3:ListBucket",),
    Call("s3", "list_object_versions"): ("s3:ListBucketVersions",),
    Call("s3", "head_object"): ("s3:GetObject",),
    Call("s3", "download_file"): ("s3:GetObject",),
    Call("s3", "upload_file"): ("s3:AbortMultipartUpload", "s3:PutObject"),
    Call("s3", "delete_objects"): ("s3:DeleteObject", "s3:DeleteObjectVersion"),
}


def actions_of(call: Call) -> tuple[str, ...]:
    "Return the IAM actions that `call` needs; raise `ValueError` when the service has no such call."
    if call in ACTIONS:
        return ACTIONS[call]
    for name in service_model(call.service).operation_names:
        if name.lower() == call.method.replace("_", ""):
            return (f"{PREFIX.get(call.service, call.service)}:{name}",)
    raise ValueError(f"{call.service} has no {call.method}")


def derived(name: str) -> set[str]:
    "Return the actions that the code of the role called `name` needs."
    return {action for call in calls_from(ENTRY_POINTS.get(name, ())) for action in actions_of(call)}


def granted(role: Role) -> set[str]:
    "Return the actions that the role has for our own code, by the table."
    return {action for grant in role.grants if not grant.reason for action in grant.actions}
