"The first stage: `python train.py -d DIR`; `python train.py` alone trains on drawn faces."

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.cli.resume import record_of
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.utils.distributed import in_turn, on_first


def main() -> None:
    args = on_first(arguments.train_arguments)
    drawn = args.data is None
    settings = resolve.first_settings(args, drawn)
    default_name = f"{settings.arch}_b_{settings.batch_size}_e_{settings.epochs}"
    with claimed_run(args.out, args.name, default_name, record_of(args), args.overwrite, args.resume) as run:
        print(f"run {run.name}", flush=True)

        from landmarks_fastai.training.builders import first_stage, resumed_stage
        from landmarks_fastai.training.stage import find_lr, fit_stage, note_low_lr, report
        from landmarks_fastai.training.state import read_state

        machine = resolve.machine(args)
        state, lr = read_state(run), None
        if state:
            print(app.resume_message(state))
            learn = resumed_stage(state, machine, run)
        else:
            weights = args.weights if args.weights is not None else "none" if drawn else "imagenet"
            if drawn:
                settings = in_turn(lambda: resolve.drawn_faces(settings, args.out, weights))
            learn = first_stage(settings, weights, machine, run)
            if args.lr == "find":
                lr = find_lr(learn, run)
            elif args.lr:
                note_low_lr(learn, resolve.default_lr(args, drawn))
        best = fit_stage(learn, run, started=app.started(state), state=state, lr=lr)
        print(report(run, best, machine))


def command() -> None:
    "The command `landmarks-train`."
    app.run_main(main)
