#!/usr/bin/env python3
"""Train or evaluate a Detectron2 model with non-local blocks. ``--help`` has examples."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
from pathlib import Path

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from nl_detectron.analysis.metrics import TASKS, last_aps, metrics_file
from nl_detectron.data.pictures import UnreadableImageError
from nl_detectron.engine import (
    NonLocalCheckpointer,
    Trainer,
    build_config,
    launch,
    parse_arguments,
)
from nl_detectron.engine.command_line import exit_on_user_error
from nl_detectron.engine.finetune import tell_schedule, use_recipe
from nl_detectron.engine.interruption import sole_run
from nl_detectron.engine.run_config import keep_values_of_checkpoint, saved_run
from nl_detectron.engine.setup import (
    check_datasets,
    check_evaluation,
    check_weights_exist,
    drop_late_steps,
    register_datasets,
    set_up_logging,
    use_cpu_without_cuda,
    use_own_data,
    use_sync_bn_of_cpu,
)

logger = logging.getLogger("nl_detectron")


def setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    set_up_logging(cfg.OUTPUT_DIR)
    can_resume = args.resume and any(Path(cfg.OUTPUT_DIR).glob("*.pth"))
    if args.eval_only and not cfg.MODEL.WEIGHTS and not can_resume:
        raise ValueError("MODEL.WEIGHTS is empty, but --eval-only needs weights")
    if not args.resume:
        check_weights_exist("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    files = (args.train_json, args.train_images, args.val_json, args.val_images)
    if any(files):
        use_own_data(cfg, *files, eval_only=args.eval_only)
    else:
        register_datasets(cfg, eval_only=args.eval_only)
    use_cpu_without_cuda(cfg)
    if args.finetune:
        check_datasets(cfg)
        saved = saved_run(cfg.OUTPUT_DIR).get("config") if args.resume else None
        use_recipe(cfg, args.opts[::2], saved)
    elif not args.eval_only:
        tell_schedule(cfg)
    if not args.eval_only:
        if args.resume:
            keep_values_of_checkpoint(cfg, cfg.OUTPUT_DIR)
        drop_late_steps(cfg)
    check_datasets(cfg, eval_only=args.eval_only)
    check_evaluation(cfg, eval_only=args.eval_only)
    use_sync_bn_of_cpu(cfg)
    cfg.freeze()
    default_setup(cfg, args)


def end_of(cfg: CfgNode) -> str:
    """What a run has reached, where it is, and what to do with it."""
    run, aps = Path(cfg.OUTPUT_DIR), last_aps(Path(cfg.OUTPUT_DIR))
    reached = [f"{TASKS[t]} AP {aps[f'{t}/AP']:.1f}" for t in TASKS if f"{t}/AP" in aps]
    return f"""
{cfg.SOLVER.MAX_ITER:,} iterations are done. On {", ".join(cfg.DATASETS.TEST)}: {
        ", ".join(reached) or "no AP"
    }
Weights, and the config that fits them     {run / "model_final.pth"}, config.yaml
Losses and APs, a line of JSON each        {metrics_file(run)}
The whole log; predictions                 {run / "log.txt"}, inference

Draw what it finds; see its curves; evaluate it again:
python demo/demo.py {run} PHOTO
python tools/plot_metrics.py {run} --output {run / "curves.png"}
python train_net.py --eval-only --config-file {run / "config.yaml"} MODEL.WEIGHTS {
        run / "model_final.pth"
    }"""


def main(args: argparse.Namespace) -> dict | None:
    with contextlib.ExitStack() as run:
        # Errors of the user show up until all is built and loaded; later ones are the program's.
        with exit_on_user_error(traceback=args.traceback):
            cfg = build_config(args.config_file, args.opts)
            if not args.eval_only:
                run.enter_context(sole_run(cfg.OUTPUT_DIR))
            setup(cfg, args)
            if args.eval_only:
                model = Trainer.build_model(cfg)
                checkpointer = NonLocalCheckpointer(
                    model, cfg.OUTPUT_DIR, strict=args.strict_weights, report=args.weights_report
                )
                checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            else:
                trainer = Trainer(cfg)
                trainer.checkpointer.strict = args.strict_weights
                trainer.checkpointer.report = args.weights_report
                trainer.resume_or_load(resume=args.resume)

        if not args.eval_only:
            with exit_on_user_error((UnreadableImageError,), traceback=args.traceback):
                results = trainer.train()
            if comm.is_main_process():
                print(end_of(cfg))
            return results
        with exit_on_user_error((OSError,), traceback=args.traceback):  # of data that is not there
            results = Trainer.test(cfg, model)
            if cfg.TEST.AUG.ENABLED:
                results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
            values = [value for result in results.values() for value in result.values()]
            if values and all(map(math.isnan, values)):
                logger.warning("The model predicts nothing in any image, so there is no AP")
        return results


if __name__ == "__main__":
    launch(main, parse_arguments())
