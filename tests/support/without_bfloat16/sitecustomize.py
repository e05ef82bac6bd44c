"""Hide what a processor has beyond AVX2 from vLLM and from torch's own questions, in every process that starts with it.

Python imports this module by itself where its folder is on PYTHONPATH. Together with the switches of the libraries it
makes a machine like one that has no instructions for bfloat16:

    export PYTHONPATH=$PWD/tests/support/without_bfloat16 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
    make test
"""

import sys
from importlib.machinery import PathFinder

_HIDDEN = ("avx512", "amx", "avx10")


class _Hides:
    """Finds `torch.cpu` as Python would, and takes out of it what is hidden."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "torch.cpu" else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                there = module.get_capabilities
                module.get_capabilities = lambda: {k: v for k, v in there().items() if not k.startswith(_HIDDEN)}

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Hides)
