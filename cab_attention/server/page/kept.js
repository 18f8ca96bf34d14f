// What the cache kept: a map over layers and KV heads, and the prompt with its kept tokens lit.

const byId = (id) => document.getElementById(id);
const [map, tokens, layer, head] = ["map", "tokens", "layer", "head"].map(byId);
let kept = []; // positions, by layer and KV head
let pieces = []; // the prompt's text, token by token
let spans = [];
let n = 0; // tokens of the prompt

export function showKept(report, usage) {
  kept = report.kept_positions;
  pieces = report.prompt_pieces;
  n = usage.prompt_tokens;
  layer.max = kept.length;
  head.max = Math.max(...kept.map((heads) => heads.length));
  layer.value = head.value = 0;
  spans = (pieces ?? []).map((piece) => {
    const span = document.createElement("span");
    span.textContent = piece;
    return span;
  });
  tokens.replaceChildren(...spans);
  if (!pieces) tokens.textContent = "This model's tokenizer does not say which characters a token stands for.";
  byId("kept").hidden = false;
  light();
}

export function hideKept() {
  byId("kept").hidden = true;
}

// Of the chosen layers and heads, the share that kept each token.
function light() {
  const [l, h] = [Number(layer.value), Number(head.value)];
  const chosen = kept.filter((_, i) => !l || i + 1 === l).flatMap((heads) => heads.filter((_, i) => !h || i + 1 === h));
  const counts = new Uint32Array(n);
  for (const positions of chosen) for (const position of positions) counts[position] += 1;
  spans.forEach((span, i) => {
    span.className = counts[i] ? "" : "none";
    span.style.setProperty("--share", counts[i] / chosen.length);
    span.title = chosen.length === 1 ? `token ${i}` : `token ${i}: kept by ${counts[i]} of ${chosen.length}`;
  });
  for (const [slider, chosenOne] of [[layer, l], [head, h]]) {
    slider.ariaValueText = chosenOne ? `${chosenOne} of ${slider.max}` : `all ${slider.max}`;
    byId(`${slider.id}-name`).textContent = slider.ariaValueText;
  }
  const held = chosen.reduce((sum, positions) => sum + positions.length, 0) / chosen.length;
  const somewhere = counts.reduce((sum, count) => sum + (count > 0), 0);
  byId("kept-summary").textContent = chosen.length === 1
    ? `Layer ${l || 1}, KV head ${h || 1} kept ${held} of ${n} tokens.`
    : `${held.toFixed(0)} of ${n} tokens kept by each layer and head, on average; ${n - somewhere} by none of them.`;
  draw(l, h);
}

const GAP = 3; // pixels between layers

function rowHeight() {
  const rows = kept.reduce((sum, heads) => sum + heads.length, 0);
  return Math.max(2, Math.min(8, Math.floor(180 / rows)));
}

function draw(l, h) {
  const colours = getComputedStyle(document.documentElement);
  const [width, row] = [map.clientWidth, rowHeight()];
  const height = kept.reduce((sum, heads) => sum + heads.length * row + GAP, -GAP);
  map.style.height = `${height}px`;
  map.width = Math.round(width * devicePixelRatio);
  map.height = height * devicePixelRatio;
  const pen = map.getContext("2d");
  pen.scale(1, devicePixelRatio); // across, whole pixels of the device: neighbours leave no seam
  const edge = (position) => Math.floor((position / n) * map.width);
  let y = 0;
  kept.forEach((heads, i) => {
    heads.forEach((positions, j) => {
      const chosen = (!l || l === i + 1) && (!h || h === j + 1);
      pen.globalAlpha = chosen ? 0.13 : 0.05;
      pen.fillStyle = colours.getPropertyValue("--quiet");
      pen.fillRect(0, y, map.width, row - 1);
      pen.globalAlpha = chosen ? 1 : 0.22;
      pen.fillStyle = colours.getPropertyValue("--accent");
      for (let from = 0, to; from < positions.length; from = to) {
        for (to = from + 1; positions[to] === positions[to - 1] + 1; ) to += 1; // neighbours in one piece
        const left = edge(positions[from]);
        pen.fillRect(left, y, Math.max(1, edge(positions[to - 1] + 1) - left), row - 1);
      }
      y += row;
    });
    y += GAP;
  });
}

// A click chooses a row, a second one all rows again.
map.addEventListener("click", (event) => {
  let y = event.offsetY;
  for (let i = 0; i < kept.length; i += 1) {
    const height = kept[i].length * rowHeight() + GAP;
    if (y < height) {
      const j = Math.min(kept[i].length - 1, Math.floor(y / rowHeight()));
      const again = Number(layer.value) === i + 1 && Number(head.value) === j + 1;
      [layer.value, head.value] = again ? [0, 0] : [i + 1, j + 1];
      light();
      return;
    }
    y -= height;
  }
});

const redraw = () => byId("kept").hidden || draw(Number(layer.value), Number(head.value));
for (const slider of [layer, head]) slider.addEventListener("input", light);
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
