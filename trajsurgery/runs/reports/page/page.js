"use strict";
const figures = JSON.parse(document.getElementById("chart-data").textContent);
const root = document.documentElement;

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function withTheme(layout) {
  const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  return {
    height: 300,
    margin: { l: 56, r: 14, t: 36, b: 44 },
    hovermode: "x unified",
    hoverdistance: -1, // also between two points that are far apart, as in a short run
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    font: { family: "system-ui, sans-serif", size: 12, color: colour("--soft") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const figure = figures[plot.dataset.figure];
  Plotly.newPlot(plot, figure.data, withTheme(figure.layout), { responsive: true, displayModeBar: false });
}

function redraw() {
  for (const plot of plots) Plotly.relayout(plot, withTheme(figures[plot.dataset.figure].layout));
}

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

for (const compare of document.querySelectorAll(".compare")) {
  compare.querySelector("input").addEventListener("input", (event) => {
    compare.style.setProperty("--cut", event.target.value + "%");
  });
}

const buttons = [...document.querySelectorAll(".filters button")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    for (const pair of document.querySelectorAll(".pair")) {
      pair.hidden = button.dataset.category !== "" && pair.dataset.category !== button.dataset.category;
    }
  });
}

for (const image of document.querySelectorAll("img")) {
  const mark = () => image.classList.toggle("small", image.naturalWidth > 0 && image.naturalWidth < 128);
  if (image.complete) mark(); else image.addEventListener("load", mark);
}

const dialog = document.getElementById("zoom");
for (const pair of document.querySelectorAll(".pair")) {
  pair.querySelector(".prompt").addEventListener("click", () => {
    const [after, before] = pair.querySelectorAll("img");
    const shown = [["before", before], ["after", after]].map(([name, image]) => {
      const figure = document.createElement("figure"), copy = image.cloneNode(), caption = document.createElement("figcaption");
      copy.classList.remove("over");
      caption.textContent = name;
      figure.append(copy, caption);
      return figure;
    });
    dialog.querySelector(".pictures").replaceChildren(...shown);
    dialog.querySelector("p").textContent = pair.querySelector("figcaption").innerText.replace("\n", ": ");
    dialog.showModal();
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
