"""To look at: RAC's corrections as a page, training curves, accuracy over data or epochs, sentence distances.

    python tools/show.py corrections runs/rac/D_r_1 --model runs/rac --out corrections.html      # Figs. 1, 5 and 6
    python tools/show.py corrections runs/rac/D_r_1 --model runs/rac --terminal 5 --sheet fifty.md
    python tools/show.py plots runs/sft runs/bash runs/rac --out plots                           # log.jsonl of each
    python tools/show.py plots runs/eval/*/results.json --x-label "training examples" --out plots      # Figs. 3, 4
    python tools/show.py pass-at-k runs/eval/*/results.json --temperature 1 --out plots
    python tools/show.py distance sft=z-sft.jsonl rac=z-rac.jsonl --out distance                 # Fig. 2

`corrections` marks each token of z that the label z_bar changes as [z→z_bar]. The page is one file that asks for
nothing over the network; what the model wrote is text in it, never markup (a content security policy forbids any other
script), and control characters are spelt out, here and in the terminal.

`plots` writes PNG and SVG: training.* has a panel for the loss, each of its terms, gradient norm, learning rate,
tokens/s and what --eval-every measured. From results.json files of `evaluate.py run --x NUMBER` (training examples,
epochs, ...) it draws each metric over x, a line a --name, the mean ± standard error over seeds.

`pass-at-k` draws pass@k over k, from results.json files of `evaluate.py run --generations N`: a line a --name, the mean
± standard error over seeds.

`distance` reads what `generate.py --n 256 --temperature 0.7` wrote, embeds responses and references, and draws a violin
of 1 - cosine similarity for each query and file; the box inside shows minimum, quartiles, median and maximum. (The
paper names that embedding, and not the distance.)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from whatever folder this is called
from core.flags import count, new_parser, number, positive
from core.ranks import cli
from tools.corrections import corrections
from tools.plots import distance, pass_at_k, plots


def main() -> None:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("corrections", help="what RAC's labels change in z", allow_abbrev=False)
    p.add_argument("d_r", help="a D_r folder, as rac.py writes it")
    p.add_argument("--model", "--tokenizer", required=True, help="the folder whose tokenizer wrote it")
    p.add_argument("--out", help="the page, an .html file")
    p.add_argument("--limit", type=positive, default=200, help="rows on the page")
    p.add_argument("--terminal", type=count, default=0, help="print the first N rows")
    p.add_argument("--sheet", help="a .md file: fifty single corrections in a table, to judge each")
    p = commands.add_parser("plots", help="training curves; metrics over data size or epochs", allow_abbrev=False)
    p.add_argument("runs", nargs="+", help="folders with a log.jsonl, or results.json files")
    p.add_argument("--out", required=True, help="a folder")
    p.add_argument("--metric", help="only this one of results.json")
    p.add_argument("--x-label", default="x", help="what --x of `evaluate.py run` is")
    p.add_argument("--log-x", action="store_true")
    p = commands.add_parser("pass-at-k", help="pass@k over k", allow_abbrev=False)
    p.add_argument("results", nargs="+", help="results.json files")
    p.add_argument("--out", required=True, help="a folder")
    p.add_argument("--temperature", type=number(0), default=1.0, help="of the generations")
    p = commands.add_parser("distance", help="sentence distances to the reference", allow_abbrev=False)
    p.add_argument("files", nargs="+", help="NAME=FILE, files of `generate.py --n N`")
    p.add_argument("--out", required=True, help="a folder")
    p.add_argument("--embedder", default="sentence-transformers/all-mpnet-base-v2", help="of sentence-transformers")
    p.add_argument("--rows", type=lambda text: [count(part) for part in text.split(",")], default=[], help="ids")
    args = parser.parse_args()
    {"corrections": corrections, "plots": plots, "pass-at-k": pass_at_k, "distance": distance}[args.command](args)


if __name__ == "__main__":
    cli(main)
