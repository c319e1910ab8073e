"""Every router, selection and kind of capacity, in a small model each."""

from .models import compare, router_models
from .tell import Teller


def run(teller: Teller) -> None:
    for name, model in router_models().items():
        compare(teller, name, model)
