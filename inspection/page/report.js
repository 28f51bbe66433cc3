"use strict";
// Everything from the store reaches the page as text (textContent), never as markup.
(() => {
  const { rows, columns, kept, num_targets: numTargets } = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const example = element("example"), threshold = element("threshold");
  const probEdges = [0.01, 0.1, 0.5, 0.9];
  const percent = (part, whole) => (100 * part / whole).toFixed(1) + " %";
  let row = null, targets = [];

  // As the rule does: mass_rank <= 1 - threshold, both in float32.
  const isKept = (place) => Math.fround(row.scores.mass_rank[place]) <= Math.fround(1 - Number(threshold.value));

  function show(index) {
    row = rows[index];
    for (const button of document.querySelectorAll("[data-row]")) {
      button.setAttribute("aria-current", String(Number(button.dataset.row) === index));
    }
    element("example-title").textContent = "Row " + row.row_id;
    targets = [];
    example.replaceChildren(...row.texts.map((text, place) => {
      const span = document.createElement("span");
      const logprob = row.scores.logprob[place];
      span.textContent = text;
      span.dataset.place = place;
      if (logprob === null) {
        span.className = "context";
        return span;
      }
      const level = probEdges.filter((edge) => Math.exp(logprob) >= edge).length;
      span.className = "t s" + level;
      span.tabIndex = targets.length ? -1 : 0;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      targets.push(span);
      return span;
    }));
    const last = row.first + row.texts.length;
    if (row.first > 0 || last < row.num_tokens) {
      example.append(` … tokens ${row.first} to ${last - 1} of ${row.num_tokens}`);
    }
    element("token").textContent = "";
    grey();
  }

  function grey() {
    const value = Number(threshold.value);
    element("threshold-value").textContent = value.toFixed(2);
    let numKept = 0;
    for (const span of targets) {
      const keeps = isKept(Number(span.dataset.place));
      span.classList.toggle("dropped", !keeps);
      numKept += keeps;
    }
    const ofStore = kept[Math.round(value * 100)];
    element("kept").textContent = `Threshold ${value.toFixed(2)} keeps ${numKept} of ${targets.length} targets shown ` +
      `(${percent(numKept, targets.length)}), and ${ofStore} of ${numTargets} of the store (${percent(ofStore, numTargets)}).`;
  }

  function tell(span) {
    for (const other of example.querySelectorAll(".at")) {
      other.classList.remove("at");
      other.setAttribute("aria-selected", "false");
    }
    span.classList.add("at");
    span.setAttribute("aria-selected", "true");
    const place = Number(span.dataset.place), { logprob, mass_rank: massRank } = row.scores;
    const parts = [`“${row.texts[place]}”`, `id ${row.ids[place]}`, `position ${row.first + place}`];
    parts.push(`p ${Math.exp(logprob[place]).toPrecision(4)}`, `u ${(1 - massRank[place]).toPrecision(4)}`);
    parts.push(...columns.map((name) => `${name} ${row.scores[name][place].toPrecision(4)}`));
    parts.push(isKept(place) ? "kept" : "dropped");
    element("token").textContent = parts.join(" · ");
  }

  function search(event) {
    const wanted = element("search").value.trim();
    if (!wanted) {
      element("found").textContent = "";
      return;
    }
    let index = rows.findIndex((it) => it.row_id === wanted || String(it.source_index) === wanted);
    if (index < 0 && event.type === "change") index = rows.findIndex((it) => it.row_id.includes(wanted));
    element("found").textContent = index < 0 ? "Not among the rows of this page; prift-inspect show finds every row."
      : `Row ${rows[index].row_id} is shown below.`;
    if (index >= 0) show(index);
  }

  function move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const at = targets.indexOf(document.activeElement);
    let next = event.key === "Home" ? 0 : event.key === "End" ? targets.length - 1 : at + (steps[event.key] ?? NaN);
    if (at < 0 || Number.isNaN(next)) return;
    event.preventDefault();
    next = Math.min(Math.max(next, 0), targets.length - 1);
    targets[at].tabIndex = -1;
    targets[next].tabIndex = 0;
    targets[next].focus();
  }

  const onTarget = (event) => { if (event.target.classList.contains("t")) tell(event.target); };
  example.addEventListener("pointerover", onTarget);
  example.addEventListener("click", onTarget);
  example.addEventListener("focusin", onTarget);
  example.addEventListener("keydown", move);
  threshold.addEventListener("input", grey);
  element("search").addEventListener("input", search);
  element("search").addEventListener("change", search);
  element("row-table").addEventListener("click", (event) => {
    const button = event.target.closest("[data-row]");
    if (button) show(Number(button.dataset.row));
  });
  element("row-ids").append(...rows.map((it) => {
    const option = document.createElement("option");
    option.value = it.row_id;
    return option;
  }));
  if (rows.length) show(0);
})();
