"""A page to try the models: an image at every keystroke, and why one step is enough.

    pip install -r requirements-app.txt
    python app.py                                       the shipped models, http://127.0.0.1:7860
    python app.py --model runs/instaflow.safetensors sd14.safetensors --port 8000

The list of models holds --model, runs/ and toy/. A tiny or few-step model samples at every
keystroke, always from the noise of one seed; other models wait for Enter. "Compare" gives one
prompt and one noise to a teacher, a 2-RF and a one-step model. The page shows the end-point
estimates x_t + (1 - t) v of the many-step models' Euler paths: where a path would end if it
continued straight. On a straight path the estimates agree from the first step on, so one step is
enough.

One worker computes; requests wait in a queue. The page loads nothing from other machines.
"""

import functools
import html
import os
import socket
import tempfile
from contextlib import contextmanager

import torch

from app_sampling import (
    Settings, command_to_make, evaluations, find_models, known_prompts, label, last_change, load,
    model_to_compare, path_strip, prompt_remark, read_settings, sample_files, short_name,
)
from command import (
    TINY_ONE_STEP, BadInput, Parser, add_machine_options, at_least, is_out_of_memory, pick_device,
    pick_dtype, run,
)
from formats.hub import is_hub_name
from sample import user_seed
from stable_diffusion import FAMILIES
from toy.two_points import COUPLINGS, EXPLANATION, describe_landing, two_points_figure

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
try:
    import gradio as gr
except ImportError:
    gr = None

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.pixels img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.strip img { padding-top: 30px; }
#figure img { object-fit: contain; }
"""
COLUMNS = {"diffusion": "Teacher", "flow": "2-RF", "one-step": "One step"}


# --------------------------------------------------------------------------------------------------
# Text on the page


@contextmanager
def problems_on_page():
    """What the user can fix becomes a message on the page, and the block ends there.

    Not a gr.Error: gradio 6.31 drops the keystroke that waits behind a request that fails.
    """
    try:
        yield
        return
    except BadInput as problem:
        message = str(problem)
    except UnicodeEncodeError:
        message = "the prompt is not Unicode text"
    except OSError as problem:
        message = f"{problem.filename or 'a file'}: {problem.strerror or problem}"
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        message = "out of memory; take a smaller size"
    gr.Warning(html.escape(message, quote=False))


def cost(settings: Settings, seconds: float) -> str:
    steps = settings.steps
    return (f"**{1000 * seconds:,.0f} ms** · {steps} step{'s' * (steps > 1)} · "
            f"{evaluations(settings)} NFE · guidance {settings.guidance:g}")


# --------------------------------------------------------------------------------------------------
# The page


def build_page(given: list[str], device, dtype, tokenizer: str | None = None, seed: int = 0):
    """The page, a gr.Blocks, with the first of `given` chosen. BadInput: it does not load."""
    folder = tempfile.TemporaryDirectory(prefix="instaflow-")  # of images; removed at the end
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    given = [path if is_hub_name(path) else os.path.abspath(path) for path in given]
    load_here = lambda path: load(path, last_change(path), device, dtype,
                                  tokenizer if path in given else None)
    models_now = lambda: find_models(given, tokenizer)
    listed = lambda: [(label(path, model), path) for path, model in models_now().items()]

    def choose(path: str, previous: str):
        if path == previous:
            return [gr.skip()] * 6
        with problems_on_page():
            model = load_here(path)
            samples = gr.Dataset(samples=[[known] for known in known_prompts(model.family)])
            return path, path, samples, model.steps, model.guidance, model.image_side
        return previous, *[gr.skip()] * 5

    def prompt_for(path: str, prompt: str):
        """This model's first example, if the prompt is an example of another data set."""
        with problems_on_page():
            known = known_prompts(load_here(path).family)
            if prompt not in known and any(prompt in known_prompts(name) for name in FAMILIES):
                return known[0]
        return gr.skip()  # not `prompt`: the user may have typed on

    def update(path: str, prompt: str, *fields, is_typing: bool = True):
        if is_typing and None in fields:  # a field is empty until its next digit
            return [gr.skip()] * 3
        with problems_on_page():
            model = load_here(path)
            settings = read_settings(model, *fields)
            if is_typing and settings.steps > 1 and not (model.is_tiny or model.few_step):
                return gr.skip(), gr.skip(), f"{settings.steps} steps: press Enter to sample"
            [file], seconds = sample_files(model, prompt, settings, folder.name)
            remark = prompt_remark(model, prompt)
            return file, file, " · ".join(filter(None, (cost(settings, seconds), remark)))
        return [gr.skip()] * 3

    def sample_four(path: str, prompt: str, *fields):
        with problems_on_page():
            model = load_here(path)
            settings = read_settings(model, *fields)
            files, _ = sample_files(model, prompt, settings, folder.name, 4)
            captions = [f"seed {settings.seed + k}" for k in range(len(files))]
            return gr.Gallery([*zip(files, captions)], visible=True)
        return gr.skip()

    def compare(path: str, prompt: str, *fields):
        with problems_on_page():
            settings = read_settings(load_here(path), *fields)
            models, paths = models_now(), []
            yield {area: gr.Column(visible=True)} | {s: gr.Image(visible=False) for s in strips}
            for text, picture, (kind, title) in zip(texts, pictures, COLUMNS.items()):
                other = model_to_compare(models, path, kind)
                if other is None:
                    yield {text: f"### {title}\nruns/ and toy/ hold none of this data set. Make "
                                 "one, for a tiny model in minutes, and compare again:\n```\n"
                                 f"{command_to_make(models, path, kind)}\n```",
                           picture: gr.Image(visible=False)}
                    continue
                model, how = load_here(other), settings
                if other != path:  # the page's fields are the chosen model's
                    how = settings._replace(steps=model.steps, guidance=model.guidance)
                [file], seconds = sample_files(model, prompt, how, folder.name)
                yield {text: f"### {title}\n{cost(how, seconds)}  \n{short_name(other)}",
                       picture: gr.Image(file, visible=True)}
                if how.steps > 1 and not model.few_step:
                    paths.append((title, model, how))
            for picture, (title, model, how) in zip(strips, paths):
                about = f"{title}: end-point estimate of each of {how.steps} Euler steps"
                yield {picture: gr.Image(path_strip(model, prompt, how), label=about, visible=True)}

    first = load_here(given[0])
    prompts = known_prompts(first.family)
    with gr.Blocks(title="InstaFlow from scratch", analytics_enabled=False) as page:
        gr.Markdown("# InstaFlow from scratch\nText to image in one step, on this machine.")
        with gr.Tab("Generate"):
            chosen = gr.State(given[0])
            with gr.Row():
                with gr.Column():
                    prompt = gr.Textbox(prompts[0], label="Prompt", max_lines=1, autofocus=True,
                                        info="The image changes while you type.")
                    examples = gr.Dataset(label="Prompts like those it was trained on",
                                          components=[prompt],
                                          samples=[[known] for known in prompts])
                    model = gr.Dropdown(listed(), value=given[0], label="Model")
                    with gr.Row():
                        values = {"Seed": seed, "Steps": first.steps, "Guidance": first.guidance,
                                  "Size": first.image_side}
                        fields = [gr.Number(value, label=name, min_width=80)
                                  for name, value in values.items()]
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary", min_width=80)
                        four = gr.Button("Four seeds", min_width=80)
                        versus = gr.Button("Compare", min_width=80)
                with gr.Column():
                    image = gr.Image(label="Image", height=514, buttons=["fullscreen"],
                                     elem_id="image", elem_classes="pixels")
                    status = gr.Markdown(elem_id="status")
                    download = gr.DownloadButton("Download PNG", size="sm", elem_id="download")
            gallery = gr.Gallery(label="Four seeds", columns=4, rows=1, height=290, visible=False,
                                 object_fit="contain", elem_id="gallery", elem_classes="pixels")
            with gr.Column(visible=False, elem_id="compare") as area:
                texts, pictures = [], []
                with gr.Row():
                    for kind in COLUMNS:
                        with gr.Column(elem_id=kind):
                            texts.append(gr.Markdown())
                            pictures.append(gr.Image(show_label=False, height=320, buttons=[],
                                                     elem_classes="pixels"))
                strips = [gr.Image(visible=False, buttons=["fullscreen"], elem_classes="strip")
                          for _ in range(2)]
        with gr.Tab("Why one step works") as why:
            gr.Markdown(EXPLANATION)
            with gr.Row():
                steps = gr.Slider(1, 32, 1, step=1, label="Euler steps", elem_id="steps")
                coupling = gr.Radio(COUPLINGS, value=COUPLINGS[0], label="Pairs")
            landing = gr.Markdown(elem_id="landing")
            figure = gr.Plot(show_label=False, elem_id="figure")

        inputs, outputs = [chosen, prompt, *fields], [image, download, status]
        worker = {"concurrency_id": "model", "concurrency_limit": 1}
        live = {"trigger_mode": "always_last", "show_progress": "hidden"}
        *numbers, size = fields
        # prompt.change, since prompt.input of gradio 6.31 misses what is pasted or deleted.
        gr.on([page.load, prompt.change, *(number.input for number in numbers), size.submit,
               size.blur], update, inputs, outputs, **live, **worker)
        gr.on([prompt.submit, generate.click], functools.partial(update, is_typing=False), inputs,
              outputs, **worker)
        examples.click(lambda sample: sample[0], examples, prompt)
        # One after the other: each change of the prompt samples with all fields as they are then.
        model.change(choose, [model, chosen], [model, chosen, examples, *fields[1:]], **worker,
                     ).success(prompt_for, [chosen, prompt], prompt, **worker,
                     ).success(update, inputs, outputs, **live, **worker)
        page.load(lambda: gr.Dropdown(listed()), None, model)
        four.click(sample_four, inputs, gallery, scroll_to_output=True, **worker)
        versus.click(compare, inputs, [area, *texts, *pictures, *strips], scroll_to_output=True,
                     **worker)
        gr.on([why.select, steps.change, coupling.change],
              lambda *how: (two_points_figure(*how), describe_landing(*how)), [coupling, steps],
              [figure, landing], **live)
    page.folder = folder  # lives as long as the page
    return page


# --------------------------------------------------------------------------------------------------
# The command


def free_port(host: str, first: int) -> int:
    """The first free port from this one on; 0: any. BadInput: none."""
    for port in range(first, min(first + 100, 2**16)):
        try:
            with socket.create_server((host, port)) as server:
                return server.getsockname()[1]
        except OSError as problem:
            why = problem.strerror or problem
    raise BadInput(f"--host {host} --port {first}: cannot listen there ({why})")


def launch(page, host: str, port: int) -> str:
    """Serve the page in threads of this process; its URL."""
    page.queue(default_concurrency_limit=1)
    # Gradio calls its own server once, which must not go to a proxy.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, (direct, "localhost,127.0.0.1", host)))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, url, _ = page.launch(
        server_name=host, server_port=free_port(host, port), prevent_thread_lock=True, quiet=True,
        share=False, ssr_mode=False, footer_links=[], theme=theme, css=CSS,
    )
    return url


def main():
    parser = Parser("A page to try the models in a browser.")
    add = parser.add_argument
    add("--model", nargs="+", default=[TINY_ONE_STEP], help="checkpoints; the first is chosen")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a --model without its own")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: open to other machines")
    add("--port", type=at_least(0, below=2**16), default=7860, help="or the next free one; 0: any")
    add_machine_options(parser, user_seed)
    args = parser.parse_args()
    if gr is None:
        raise BadInput("the page needs gradio: pip install -r requirements-app.txt")
    # Outside the main thread, torch is slow with a thread for every core: on 2 cores an image of
    # the emoji teacher takes 0.42 seconds with two threads, 0.23 with one, 0.17 in the main thread.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    device = pick_device(args.device)
    page = build_page(args.model, device, pick_dtype(args.dtype, device), args.tokenizer, args.seed)
    print(f"{launch(page, args.host, args.port)}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run(main)
