"use strict";
const tip = document.getElementById("tip");

function show(event, text) {
  tip.textContent = text;
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  const x = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  const y = Math.min(event.clientY + 14, innerHeight - box.height - 8);
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, y)}px`;
}

function hide() {
  tip.style.visibility = "hidden";
  for (const line of document.querySelectorAll("line.cursor")) line.style.visibility = "hidden";
}

function nearest(points, x) {
  return points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
}

for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1] = svg.dataset.x.split(",").map(Number);
  const [y0, y1] = svg.dataset.y.split(",").map(Number);
  const [left, right, top, bottom] = svg.dataset.frame.split(",").map(Number);
  const unit = Number(svg.dataset.unit);
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)),
  }));
  const cursor = svg.querySelector("line.cursor");
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const x = nearest(lines.flatMap((l) => l.points), at.x)[0];
    const value = (x0 + ((x - left) / (right - left)) * (x1 - x0)) / unit;
    const shown = lines
      .map((l) => ({ name: l.name, p: nearest(l.points, x) }))
      .filter((l) => Math.abs(l.p[0] - x) < 0.1 * (right - left))
      .map((l) => `${l.name}: ${(y0 + ((bottom - l.p[1]) / (bottom - top)) * (y1 - y0)).toFixed(3)}`);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    show(event, `${svg.dataset.label} ${Number(value.toPrecision(4))}\n${shown.join("\n")}`);
  });
  svg.addEventListener("pointerleave", hide);
}

for (const part of document.querySelectorAll("[data-tip]")) {
  part.addEventListener("pointermove", (event) => show(event, part.dataset.tip));
  part.addEventListener("pointerleave", hide);
}
