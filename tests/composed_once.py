"""Hydra finds and merges the files of the chosen options once for each choice; a test composes in a fraction of the time.

That is nine tenths of a compose, a seventh of a second, and the tests compose thousands of times. Values are parsed, checked and
merged each time. Only files of the package are remembered: folders of --config-dir are read each time. Processes that tests start
have Hydra as it is, except the ranks of tests/distributed/pool.py. tests/train/test_compose.py compares the two.
"""

import dataclasses
import functools
import pickle
from typing import Any


@functools.cache
def install() -> None:
    """From now on in this process. What is replaced is the `__wrapped__` of what replaces it."""
    from hydra._internal import config_loader_impl as loader
    from hydra._internal.defaults_list import Overrides
    from tokenyard.train.config.compose import CONF

    ours = {"hydra.conf", str(CONF), ""}  # Hydra's own, those of conf/, and the dataclasses
    find, merge = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    found: dict[Any, Any] = {}
    merged: dict[int, bytes] = {}

    @functools.wraps(find)
    def find_once(*, repo: Any, overrides_list: list[Any], **rest: Any) -> Any:
        if {source.path for source in repo.get_sources()} != ours:
            return find(repo=repo, overrides_list=overrides_list, **rest)
        values = Overrides(repo, overrides_list).config_overrides
        choices = [override for override in overrides_list if override not in values]
        key = tuple(override.input_line for override in choices), *rest.items()
        if key not in found:
            found[key] = find(repo=repo, overrides_list=choices, **rest)
        return dataclasses.replace(found[key], config_overrides=values)

    @functools.wraps(merge)
    def merge_once(self: Any, *, defaults: list[Any], repo: Any) -> Any:
        if all(defaults is not known.defaults for known in found.values()):
            return merge(self, defaults=defaults, repo=repo)
        if id(defaults) not in merged:
            merged[id(defaults)] = pickle.dumps(merge(self, defaults=defaults, repo=repo))
        return pickle.loads(merged[id(defaults)])

    loader.create_defaults_list = find_once
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
