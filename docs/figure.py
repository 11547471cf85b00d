"""Draws figure.svg and figure-dark.svg, the README's picture of the model: `python docs/figure.py`.

A square stands for 100 tokens: 202 squares are T_i, six are T_s1, three are Q_bal. Only the standard library is used.
"""

from pathlib import Path

WIDTH, HEIGHT = 980, 600
PITCH, SQUARE = 9, 7  # of the squares
LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "line": "#6e7781", "step": "#ffffff", "token": "#b6bfc9",
    "blue": "#0969da", "orange": "#d4640b", "green": "#1a7f37", "purple": "#8250df", "teal": "#1b7c83",
    "DI": "#e7f3ff", "DI_edge": "#54aeff", "BATO": "#e6f8ea", "BATO_edge": "#4ac26b",
    "house": "#bf3989", "tree": "#9a6700", "sky": "#d8e6f3", "ground": "#c5d3b4",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "ink": "#e6edf3", "muted": "#9aa4ae", "line": "#8b949e", "step": "#161b22", "token": "#545d68",
    "blue": "#58a6ff", "orange": "#f0883e", "green": "#3fb950", "purple": "#b58cff", "teal": "#39c5cf",
    "DI": "#0e2338", "DI_edge": "#1f6feb", "BATO": "#10281a", "BATO_edge": "#238636",
    "house": "#f778ba", "tree": "#e3b341", "sky": "#2b3a4a", "ground": "#37422f",
}  # fmt: skip
SYMBOLS = {  # letter, below, above
    "T_i": ("T", "i", ""), "T_s1": ("T", "s1", ""), "T_s1_sa": ("T", "s1", "sa"), "T_s2": ("T", "s2", ""),
    "Q_bal": ("Q", "bal", ""), "T_g_mask": ("T", "g", "mask"), "T_g_box": ("T", "g", "box"), "T_g": ("T", "g", ""),
    "T_bal": ("T", "bal", ""), "Q_ref": ("Q", "ref", ""), "F_cnn": ("F", "cnn", ""),
    "c": ("c", "", ""), "b": ("b", "", ""), "m": ("m", "", ""),
}  # fmt: skip


class Drawing:
    def __init__(self, colors):
        self.colors, self.parts = colors, []

    def rect(self, x, y, width, height, fill, edge="none", radius=0, stroke=1.5):
        fill, edge = self.colors.get(fill, fill), self.colors.get(edge, edge)
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{edge}" '
            f'stroke-width="{stroke}"/>'
        )

    def text(self, x, y, content, size=14, color="ink", anchor="middle", weight="normal"):
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.colors[color]}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{content}</text>'
        )

    def symbol(self, x, y, name, anchor="middle", after=""):
        """A symbol of the paper, and ordinary words after it."""
        letter, below, above = SYMBOLS[name]
        spans, level = [f'<tspan class="symbol">{letter}</tspan>'], 0
        for script, shift in ((below, 5), (above, -6)):
            if script:
                spans.append(f'<tspan dy="{shift - level}" font-size="12">{script}</tspan>')
                level = shift
        if after:
            spans.append(f'<tspan dy="{-level}" font-size="13" fill="{self.colors["muted"]}"> {after}</tspan>')
        self.text(x, y, "".join(spans), 18, anchor=anchor)

    def squares(self, cx, cy, columns, count, color, marked=()):
        """Squares row by row around a centre; `marked` ones are blue."""
        rows = -(-count // columns)
        x0, y0 = cx - columns * PITCH / 2, cy - rows * PITCH / 2
        for i in range(count):
            x, y = x0 + i % columns * PITCH + 1, y0 + i // columns * PITCH + 1
            self.rect(x, y, SQUARE, SQUARE, "blue" if i in marked else color, radius=1.5)

    def tokens(self, cx, cy, name, color, count):
        """A small set of tokens, `count` of them, with its symbol and number below."""
        squares = count // 100
        self.squares(cx, cy, 2 if squares > 3 else 1, squares, color)
        self.symbol(cx, cy + 38, name)
        self.text(cx, cy + 58, count, 13, "muted")

    def step(self, cx, cy, equation, what, width=74):
        self.rect(cx - width / 2, cy - 21, width, 42, "step", "line", 7)
        self.text(cx, cy - 4, f"Eq. {equation}", 13, weight="bold")
        self.text(cx, cy + 13, what, 13, "muted")

    def part(self, x, y, width, name):
        self.rect(x, y, width, 34, "step", "line", 7)
        self.text(x + width / 2, y + 22, name, 14)

    def arrow(self, *points, head=True):
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colors["line"]}" stroke-width="1.6" stroke-linejoin="round"'
            + (' marker-end="url(#head)"/>' if head else "/>")
        )

    def scene(self, x, y, found):
        """A picture of two objects, and what is found in it."""
        for fill, height in (("sky", 76), ("ground", 24)):
            self.rect(x, y + 76 - height, 104, height, fill, radius=3)
        house = f"M{x + 14} {y + 64} v-26 l19 -17 l19 17 v26 z"
        tree = f"M{x + 84} {y + 66} h-5 v-16 a13 13 0 1 1 10 0 v16 z"
        for path, color in ((house, "house"), (tree, "tree")):
            color = self.colors[color if found else "muted"]
            self.parts.append(f'<path d="{path}" fill="{color}" fill-opacity="{0.75 if found else 0.6}"/>')
        if found:
            self.rect(x + 11, y + 18, 44, 49, "none", "house", stroke=2)
            self.rect(x + 68, y + 22, 32, 47, "none", "tree", stroke=2)

    def svg(self):
        return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"
 width="{WIDTH}" height="{HEIGHT}"
 font-family="-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" role="img">
<title>DI-MaskDINO, from an image of 800x1216 to classes, boxes and masks, equation by equation</title>
<style>.symbol {{ font-family: Georgia, 'Times New Roman', serif; font-style: italic }}</style>
<defs><marker id="head" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 1 L9 5 L0 9 z" fill="{self.colors["line"]}"/></marker></defs>
{chr(10).join(self.parts)}
</svg>
"""


def draw(colors):
    d = Drawing(colors)
    d.rect(0, 0, WIDTH, HEIGHT, "paper", radius=8)
    top, middle, bottom, right = 114, 290, 504, 902  # centres of the three rows, and of Q_bal

    # Feature Tokens Extractor
    d.scene(16, 62, found=False)
    d.text(68, 156, "800 x 1216", 13, "muted")
    d.part(16, 186, 104, "backbone")
    d.part(40, 254, 80, "encoder")
    d.arrow((80, 162), (80, 184))
    d.arrow((80, 220), (80, 252))
    d.arrow((120, 271), (146, 271))
    chosen = (26, 63, 64, 97, 118, 171)
    d.squares(177, 218, 6, 202, "token", chosen)
    d.symbol(177, 32, "T_i")
    d.text(177, 53, "20,197 tokens", 13, "muted")
    d.text(172, 398, "a square is", 12, "muted", "start")
    d.text(172, 413, "100 tokens", 12, "muted", "start")

    # De-Imbalance
    d.rect(258, 10, 706, 172, "DI", "DI_edge", 10)
    d.text(276, 33, "De-Imbalance (DI) makes the query", 15, anchor="start", weight="bold")
    d.text(544, 33, "select, let the selected tokens interact, select again, look back", 13, "muted", "start")
    d.arrow((208, top), (272, top))
    d.step(306, top, 1, "select", 64)
    d.arrow((338, top), (358, top))
    d.tokens(371, top, "T_s1", "blue", 600)
    d.arrow((384, top), (404, top))
    d.step(465, top, 2, "self-attention × 2", 118)
    d.arrow((524, top), (540, top))
    d.tokens(554, top, "T_s1_sa", "blue", 600)
    d.arrow((567, top), (586, top))
    d.step(624, top, 3, "select")
    d.arrow((661, top), (685, top))
    d.tokens(696, top, "T_s2", "blue", 300)
    d.arrow((707, top), (730, top))
    d.step(786, top, 4, "cross-attention", 108)
    d.arrow((208, 64), (786, 64), (786, top - 23))
    d.arrow((840, top), (right - 11, top))
    d.tokens(right, top, "Q_bal", "orange", 300)

    # Balance-Aware Tokens Optimization
    d.rect(258, 196, 604, 226, "BATO", "BATO_edge", 10)
    d.text(
        276,
        219,
        "Balance-Aware Tokens Optimization (BATO) makes what the decoder reads",
        15,
        anchor="start",
        weight="bold",
    )
    d.text(
        276,
        239,
        "each token of T<tspan dy='3' font-size='10'>i</tspan><tspan dy='-3'> moves towards the guiding "
        "tokens of its object</tspan>",
        13,
        "muted",
        "start",
    )
    upper, lower = middle - 34, middle + 42
    d.arrow((right, top + 66), (right, 438), (436, 438), (436, bottom - 23))
    d.arrow((right, upper), (829, upper))
    d.arrow((right, lower), (829, lower))
    d.step(790, upper, 5, "mask MLP")
    d.step(790, lower, 6, "box MLP")
    d.arrow((753, upper), (723, upper))
    d.arrow((753, lower), (723, lower))
    d.squares(712, upper, 1, 3, "green")
    d.squares(712, lower, 1, 3, "purple")
    d.symbol(712, upper + 31, "T_g_mask")
    d.symbol(712, lower + 31, "T_g_box")
    d.arrow((701, upper), (660, upper), (624, middle - 9))
    d.arrow((701, lower), (660, lower), (624, middle + 17))
    d.step(586, middle + 4, 7, "sum")
    d.arrow((549, middle + 4), (518, middle + 4))
    d.tokens(506, middle + 4, "T_g", "teal", 300)
    d.arrow((495, middle + 4), (458, middle + 4))
    d.step(402, middle + 4, 8, "cross-attention", 108)
    d.arrow((208, middle + 4), (346, middle + 4))
    d.arrow((402, middle + 25), (402, 354))
    d.squares(428, 386, 34, 202, "teal")
    d.symbol(592, 394, "T_bal", "start", "20,197 tokens")
    d.arrow((402, 416), (402, bottom - 23))

    # Transformer Decoder
    d.step(419, bottom, 9, "decoder, 5 layers", 122)
    d.arrow((480, bottom), (520, bottom))
    d.tokens(532, bottom, "Q_ref", "orange", 300)
    d.arrow((543, bottom), (574, bottom), (574, bottom - 30), (606, bottom - 30))
    d.arrow((574, bottom), (574, bottom + 30), (606, bottom + 30))
    d.step(656, bottom - 30, 10, "detection", 96)
    d.step(656, bottom + 30, 11, "segmentation", 96)
    d.arrow((704, bottom - 30), (734, bottom - 30))
    d.arrow((704, bottom + 30), (734, bottom + 30))
    d.symbol(742, bottom - 36, "c", "start", "classes")
    d.symbol(742, bottom - 14, "b", "start", "boxes")
    d.symbol(742, bottom + 36, "m", "start", "masks")
    d.scene(846, bottom - 38, found=True)
    d.arrow((158, 374), (158, 573), (643, 573), (643, bottom + 53))
    d.arrow((28, 220), (28, 589), (669, 589), (669, bottom + 53))
    d.rect(8, 428, 44, 46, "paper")
    d.symbol(28, 444, "F_cnn")
    d.text(28, 467, "at 1/4", 13, "muted")
    return d.svg()


if __name__ == "__main__":
    for name, colors in (("figure.svg", LIGHT), ("figure-dark.svg", DARK)):
        (Path(__file__).parent / name).write_text(draw(colors))
