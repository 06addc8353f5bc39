"""The benchmark command: `python -m fusemlp.bench COMMAND --help`."""

import argparse
import sys
from collections.abc import Sequence

from . import (
    calibrate,
    codegen,
    compare,
    convergence,
    gpu_check,
    hessian,
    kernels,
    memory,
    mlp,
    ops,
    optimizers,
    predict,
    products,
    regimes,
    report,
    roofline,
    scaling,
    signals,
    traffic,
)

COMMANDS = {
    "gpu-check": gpu_check,
    "codegen": codegen,
    "traffic": traffic,
    "scaling": scaling,
    "memory": memory,
    "signals": signals,
    "compare": compare,
    "convergence": convergence,
    "optimizers": optimizers,
    "hessian": hessian,
    "report": report,
    "roofline": roofline,
    "ops": ops,
    "mlp": mlp,
    "predict": predict,
    "calibrate": calibrate,
    "products": products,
    "kernels": kernels,
    "regimes": regimes,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark command.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.

    Returns:
        The exit status: 0 on success, 1 if the command found a fault or a regression, 2 if an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="fusemlp-bench", description="Measure fusemlp and its competitors.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].main(arguments)
    except ValueError as error:
        print(f"fusemlp-bench {arguments.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
