"use strict";
// Without this script the browser shows each token's title; with it, a table, a mark on the chart, and arrow keys.
const tip = document.getElementById("tip");

// Lines of a title are "name: value"; those with tabs are rows of a table, the first of them its heading.
function facts(token) {
  if (token.title) {
    token.dataset.facts = token.title;
    token.removeAttribute("title");  // or the browser would show its own tooltip over ours
  }
  const lines = token.dataset.facts.split("\n");
  return {
    numbers: lines.filter((line) => !line.includes("\t")).map((line) => line.split(/: (.*)/s)),
    others: lines.filter((line) => line.includes("\t")).map((line) => line.split("\t")),
  };
}

function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}

function contents(token) {
  const { numbers, others } = facts(token);
  const list = element("dl", ...numbers.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  if (!others.length) return [list];
  const rows = others.map((cells, number) => element("tr", ...cells.map((c) => element(number ? "td" : "th", c))));
  for (const row of rows) row.classList.toggle("said", row.firstChild.textContent === numbers[0][1]);
  return [list, element("table", ...rows)];
}

function chartOf(token) {
  return token.closest(".response").querySelector("figure");
}

function show(token) {
  hide();
  token.classList.add("on");
  token.setAttribute("aria-describedby", "tip");
  tip.replaceChildren(...contents(token));
  tip.hidden = false;
  const box = token.getClientRects()[0], size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight || box.top < innerHeight - box.bottom;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)) + "px";
  mark(token);
}

function tokensAround(token) {
  return [...token.closest(".tokens").querySelectorAll(".t")];
}

function mark(token) {
  const chart = chartOf(token), svg = chart.querySelector("svg"), cursor = chart.querySelector(".cursor");
  const place = tokensAround(token).indexOf(token) + 1;
  cursor.style.left = svg.getBoundingClientRect().width * place / chart.dataset.length + "px";
  cursor.style.display = "block";
}

function hide() {
  for (const token of document.querySelectorAll(".t.on")) {
    token.classList.remove("on");
    token.removeAttribute("aria-describedby");
    chartOf(token).querySelector(".cursor").style.display = "none";
  }
  tip.hidden = true;
}

function step(event) {
  const token = event.target.closest(".t");
  if (event.key === "Escape") hide();
  if (!token) return;
  const tokens = tokensAround(token), move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = move && tokens[tokens.indexOf(token) + move];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

for (const [event, act] of [["mouseover", show], ["focusin", show], ["mouseout", hide], ["focusout", hide]]) {
  document.addEventListener(event, ({ target }) => {
    const token = target.closest(".t");
    if (token) act(token);
  });
}
document.addEventListener("keydown", step);
document.addEventListener("scroll", () => {
  const token = document.querySelector(".t.on");
  if (token) (token.matches(":hover, :focus") ? show : hide)(token);  // walking with the keyboard scrolls too
}, { passive: true, capture: true });
