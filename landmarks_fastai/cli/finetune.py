"A later stage: `python finetune.py -pm NAME` continues from the best checkpoint of a run, at a lower learning rate."

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.cli.resume import record_of
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.runs.run import find_checkpoint_file, run_name
from landmarks_fastai.settings import FINETUNE_EPOCHS, FINETUNE_LR_MULT
from landmarks_fastai.utils.distributed import on_first


def main() -> None:
    args = on_first(arguments.finetune_arguments)
    args.pretrained_model = str(find_checkpoint_file(args.pretrained_model, args.out))
    default_name = f"{run_name(args.pretrained_model)}+{args.epochs or FINETUNE_EPOCHS}"
    with claimed_run(args.out, args.name, default_name, record_of(args), args.overwrite, args.resume) as run:
        print(f"run {run.name}, from {args.pretrained_model}", flush=True)

        from landmarks_fastai.runs.checkpoint import read_checkpoint
        from landmarks_fastai.training.builders import later_stage, resumed_stage
        from landmarks_fastai.training.stage import find_lr, fit_stage, note_low_lr, report, score_loaded
        from landmarks_fastai.training.state import read_state

        previous = read_checkpoint(args.pretrained_model)
        settings = resolve.next_settings(args, previous.settings)
        machine = resolve.machine(args)
        state, lr = read_state(run), None
        if state:
            print(app.resume_message(state))
            learn = resumed_stage(state, machine, run)
            previous_scores = tuple(state.metadata["loaded"])
        else:
            learn = later_stage(previous, settings, machine, run)
            previous_scores = score_loaded(learn, previous)
            if args.lr == "find":
                lr = find_lr(learn, run)
            elif args.lr:
                note_low_lr(learn, FINETUNE_LR_MULT[settings.sched] * previous.settings.lr)
        best = fit_stage(learn, run, previous, previous_scores, app.started(state), state, lr)
        print(report(run, best, machine))


def command() -> None:
    "The command `landmarks-finetune`."
    app.run_main(main)
