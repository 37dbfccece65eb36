// The page: the list of runs, one run or several beside each other, and what can be asked of them. All text from
// outside becomes text nodes; nothing of it is read as markup.

import { chart, html, shown, svg } from "./chart.js";

const OVER = { updates: "update", work: "work", seconds: "seconds" };
const CHARTS = [
  ["Loss", false, [["objective", "objective"], ["loss", "training loss"], ["val_loss", "validation loss"]]],
  ["Accuracy, %", true, [["val_accuracy", "validation"], ["train_accuracy", "training"]]],
  ["Errors", false, [["val_l2", "validation, mean square"], ["train_l2", "training, mean square"], ["val_error", "validation"], ["train_error", "training"]]],
  ["Residuals of the solver", false, [["state_residual", "states"], ["adjoint_residual", "adjoints"], ["residual", "states"]]],
  ["Gradient", false, [["grad_norm", "norm"], ["gradient_error", "error, estimated"]]],
];
const STATE = { list: { runs: [], studies: [] }, chosen: [], rows: new Map(), about: new Map(), over: "updates", source: null };
const at = (id) => document.getElementById(id);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(2)} %`);

// ---- the list

function listed() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  return STATE.list.runs.filter((run) => words.every((word) => `${run.name} ${run.state} ${run.job ?? ""}`.toLowerCase().includes(word)));
}

function drawList() {
  const focus = document.activeElement?.dataset?.key;
  at("folder").textContent = STATE.list.folder ?? "";
  at("runs").replaceChildren(...listed().map(card));
  if (!STATE.list.runs.length) at("runs").append(html("li", { class: "empty" }, "No runs yet. Start one with: xbraid-py submit peaks --ranks 4"));
  at("studies").replaceChildren(...STATE.list.studies.map((each) => html("li", { class: "run" }, html("span"),
    html("strong", {}, each.name), html("div", { class: "facts" }, html("span", {}, `study, ${each.says}`)))));
  if (focus) document.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
}

function card(run) {
  const chosen = STATE.chosen.includes(run.name);
  const facts = [html("span", { class: `state ${run.state}` }, run.state)];
  if (run.job !== null) facts.push(html("span", {}, `job ${run.job}`));
  if (run.update !== null) facts.push(html("span", {}, run.total ? `${run.update} / ${run.total}` : `${run.update}`));
  if (run.accuracy !== null) facts.push(html("span", {}, percent(run.accuracy)));
  if (run.seconds_left) facts.push(html("span", {}, `${duration(run.seconds_left)} left`));
  return html("li", { class: `run${chosen ? " chosen" : ""}` },
    html("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, "data-key": `c${run.name}`, checked: chosen, disabled: !run.is_here,
      onchange: () => choose(chosen ? STATE.chosen.filter((each) => each !== run.name) : [...STATE.chosen, run.name]) }),
    html("button", { type: "button", "data-key": `b${run.name}`, "aria-current": chosen ? "true" : null, onclick: () => { choose([run.name]); at("detail").focus({ preventScroll: matchMedia("(min-width: 52rem)").matches }); } }, run.name),
    html("div", { class: "facts" }, ...facts),
    run.total ? html("progress", { max: run.total, value: run.update ?? 0, "aria-label": `Progress of ${run.name}` }) : null);
}

// ---- which runs are looked at

function choose(names) {
  STATE.chosen = names;
  const words = new URLSearchParams([...names.map((name) => ["run", name]), ["over", STATE.over]]);
  history.replaceState(null, "", `#${words}`);
  STATE.rows.clear();
  follow();
  drawList();
  drawDetail();
  names.forEach(learn);
}

async function learn(name) {
  if (!find(name)?.is_here) return; // a job that waits; the next change of its state comes here again
  const answer = await fetch(`api/run?${new URLSearchParams({ name })}`);
  if (answer.ok) STATE.about.set(name, await answer.json());
  if (STATE.chosen.includes(name)) drawDetail();
}

function follow() {
  STATE.source?.close();
  const source = new EventSource(`api/events?${new URLSearchParams(STATE.chosen.map((name) => ["name", name]))}`);
  STATE.source = source;
  source.addEventListener("open", () => { at("link").textContent = "live"; });
  source.addEventListener("error", () => { at("link").textContent = "not connected, trying again"; });
  source.addEventListener("runs", (event) => {
    const before = new Map(STATE.list.runs.map((run) => [run.name, run.state]));
    STATE.list = { ...STATE.list, ...JSON.parse(event.data) };
    drawList();
    STATE.chosen.filter((name) => before.get(name) !== find(name)?.state).forEach(learn);
    drawHead();
  });
  source.addEventListener("rows", (event) => {
    const said = JSON.parse(event.data);
    STATE.rows.set(said.name, said.again ? said.rows : [...(STATE.rows.get(said.name) ?? []), ...said.rows]);
    drawCharts();
  });
}
const find = (name) => STATE.list.runs.find((run) => run.name === name);

// ---- one run, or several

function drawDetail() {
  const focus = document.activeElement?.id;
  const names = STATE.chosen;
  if (!names.length) {
    at("detail").replaceChildren(html("p", { class: "empty" }, "Choose a run to see it, or mark several to compare them."));
    return;
  }
  const open = new Set([...at("detail").querySelectorAll("details[open]")].map((each) => each.id));
  at("detail").replaceChildren(html("div", { id: "head", class: "card" }), axes(), html("div", { id: "charts", class: "charts" }),
    ...(names.length === 1 ? single(names[0]) : compared(names)));
  open.forEach((id) => { if (at(id)) at(id).open = true; });
  drawHead();
  drawCharts();
  if (focus) at(focus)?.focus();
}

function drawHead() {
  const head = at("head");
  if (!head) return;
  const focus = document.activeElement?.id, ranks = at("ranks")?.value;
  if (STATE.chosen.length > 1) {
    head.replaceChildren(html("h2", {}, `Comparison of ${STATE.chosen.length} runs`));
    at("outcomes")?.replaceWith(outcomes(STATE.chosen));
    return;
  }
  const run = find(STATE.chosen[0]), about = STATE.about.get(STATE.chosen[0]);
  if (!run) return;
  const facts = [["Update", run.total ? `${run.update ?? 0} of ${run.total}` : shown(run.update)], ["Time left", duration(run.seconds_left)],
    ["Accuracy", percent(run.accuracy)], ["Objective", shown(run.objective)], ["Ranks", shown(run.ranks)],
    ["Where", run.job === null ? "by hand" : `job ${run.job}, ${run.on}`], ["Program", about?.driver || "–"], ["Host", about?.host || "–"]];
  head.replaceChildren(
    html("div", { class: "head" }, html("h2", {}, run.name), html("span", { class: `state ${run.state}`, id: "state" }, run.state),
      html("div", { class: "actions" },
        run.can_stop ? html("button", { id: "stop", type: "button", onclick: () => act("stop", run) }, "Stop") : null,
        run.can_resume ? html("label", {}, "Ranks ", html("input", { id: "ranks", type: "number", min: 1, value: ranks ?? run.ranks ?? 1 })) : null,
        run.can_resume ? html("button", { id: "resume", type: "button", class: "main", onclick: () => act("resume", run) }, "Resume") : null)),
    run.total ? html("progress", { max: run.total, value: run.update ?? 0, "aria-label": "Progress" }) : "",
    html("dl", { class: "facts-line" }, ...facts.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value)))),
    run.message ? html("p", { class: "note" }, run.message) : "");
  if (focus && ["stop", "resume", "ranks"].includes(focus)) (at(focus) ?? at("stop") ?? at("resume") ?? at("detail")).focus();
}

async function act(what, run) {
  const body = { name: run.is_here ? run.name : undefined, job: run.job ?? undefined };
  if (what === "resume") body.ranks = Number(at("ranks").value);
  const answer = await fetch(`api/${what}`, { method: "POST", body: JSON.stringify(body),
    headers: { "content-type": "application/json", "x-xbraid-key": STATE.list.key } });
  const text = await answer.text();
  let said = text;
  try { const found = JSON.parse(text); said = found.said ?? found.error; } catch { /* plain text */ }
  at("said").textContent = said;
  setTimeout(() => { if (at("said").textContent === said) at("said").textContent = ""; }, 8000);
}

function axes() {
  return html("fieldset", { class: "card" }, html("legend", {}, "Over"), ...Object.keys(OVER).map((name) => html("label", {},
    html("input", { type: "radio", name: "over", id: `over-${name}`, value: name, checked: STATE.over === name,
      onchange: () => { STATE.over = name; const words = new URLSearchParams(location.hash.slice(1)); words.set("over", name);
        history.replaceState(null, "", `#${words}`); drawCharts(); } }), ` ${name}`)));
}

// The curves of a quantity: its own name, or those of the parts of a network that end in it.
function curvesOf(rows, name) {
  const found = new Map();
  for (const row of rows) {
    const x = row[OVER[STATE.over]];
    if (x === undefined || x === null) continue;
    for (const [key, y] of Object.entries(row)) {
      if (key !== name && !key.endsWith(`.${name}`)) continue;
      const label = `${row.run || ""}|${key}`;
      if (!found.has(label)) found.set(label, []);
      found.get(label).push([x, y]);
    }
  }
  return [...found].map(([label, points]) => [...label.split("|"), points]);
}

function partOf(key) {
  const parts = key.split(".");
  return parts.length < 2 ? "" : `, ${parts[0].replace(/s$/, "")} ${Number(parts[1]) + 1}`;
}

function drawCharts() {
  const place = at("charts");
  if (!place) return;
  const focused = [...place.querySelectorAll("svg[tabindex]")].indexOf(document.activeElement);
  if (focused >= 0) return; // somebody reads values there; the next look draws it anew
  const several = STATE.chosen.length > 1;
  const charts = [];
  for (const [title, isPercent, quantities] of CHARTS) {
    const curves = [];
    STATE.chosen.forEach((name, color) => {
      const rows = STATE.rows.get(name) ?? [];
      const runs = new Set(rows.map((row) => row.run));
      quantities.forEach(([key, label], dash) => {
        for (const [run, full, points] of curvesOf(rows, key)) {
          const own = label + partOf(full) + (runs.size > 1 && run ? `, ${run}` : "");
          curves.push({ label: several ? `${name}: ${own}` : own, color: several ? color : curves.length, dash: several ? dash : 0, points });
        }
      });
    });
    // A solver without a coarse level has residuals of 0 throughout.
    if (curves.some((curve) => curve.points.some(([, y]) => y !== 0))) charts.push(chart(title, curves, { xlabel: STATE.over, percent: isPercent, marks: several ? [] : refinements() }));
  }
  at("outcomes")?.replaceWith(outcomes(STATE.chosen));
  place.replaceChildren(...(charts.length ? charts : [html("p", { class: "empty" }, `Nothing is recorded over ${STATE.over} yet.`)]));
}

function refinements() {
  const rows = STATE.rows.get(STATE.chosen[0]) ?? [];
  const found = [];
  rows.forEach((row, index) => {
    const before = rows[index - 1];
    if (before && row.num_layers && before.num_layers && row.num_layers !== before.num_layers && row.run === before.run) found.push([row[OVER[STATE.over]], `${row.num_layers} layers`]);
  });
  return found.filter(([x]) => x !== undefined);
}

function single(name) {
  const about = STATE.about.get(name);
  if (!about) return [html("p", { class: "empty" }, "Reading the run")];
  const parts = [];
  if (about.hierarchy.length) parts.push(html("section", { class: "card", "aria-label": "Hierarchy" }, html("h3", {}, "Hierarchy and its ranks"), levels(about.hierarchy)));
  if (about.figures.length) parts.push(html("section", { class: "card" }, html("h3", {}, "Pictures"), html("div", { class: "pictures" },
    ...about.figures.map((file) => html("a", { href: figure(name, file), target: "_blank", rel: "noopener" },
      html("img", { src: figure(name, file), alt: file.replace(/\.png$/, "").replaceAll("_", " "), loading: "lazy" }))))));
  parts.push(html("details", { class: "card", id: "options" }, html("summary", {}, "Configuration"), pairs(about.options)));
  parts.push(html("details", { class: "card", id: "versions" }, html("summary", {}, "Versions, host and checkpoints"), pairs({ ...about.about, checkpoints: about.checkpoints.join(", ") || "none", started: about.started })));
  parts.push(html("details", { class: "card", id: "log", ontoggle: (event) => { if (event.target.open) readLog(name); } },
    html("summary", {}, "Log"), html("pre", { id: "log-text", tabindex: 0, "aria-label": "Log" }, about.log)));
  if (about.flaws.length) parts.push(html("p", { class: "note" }, about.flaws.join("; ")));
  return parts;
}
const figure = (name, file) => `api/figure?${new URLSearchParams({ name, file })}`;

async function readLog(name) {
  const answer = await fetch(`api/log?${new URLSearchParams({ name })}`);
  if (!answer.ok || !at("log-text")) return;
  at("log-text").textContent = await answer.text();
  at("log-text").scrollTop = at("log-text").scrollHeight;
}
setInterval(() => { if (at("log")?.open && STATE.chosen.length === 1 && ["running", "starting", "stopping"].includes(find(STATE.chosen[0])?.state)) readLog(STATE.chosen[0]); }, 3000);

function levels(rows) {
  return html("div", { class: "levels" }, ...rows.map((row) => {
    const intervals = Number(row.intervals), ranks = Number(row.ranks), cells = Math.min(intervals, 256);
    const picture = svg("svg", { viewBox: "0 0 1000 22", preserveAspectRatio: "none", role: "img",
      "aria-label": `Level ${row.level}: ${row.intervals} intervals on ${row.ranks} ranks` });
    for (let cell = 0; cell < cells; cell++)
      picture.append(svg("rect", { class: `f${Math.floor((cell * ranks) / cells) % 8}`, x: (1000 * cell) / cells, y: 0, width: 1000 / cells, height: 22 }));
    return html("div", {}, html("div", { class: "quiet" }, `Level ${row.level}: ${Number(row.points) - 1} steps in ${row.intervals} intervals, ` +
      `${row.ranks} rank${ranks === 1 ? "" : "s"} (a color each), ${row.work} of the work`), picture);
  }));
}

function pairs(values) {
  return html("div", { class: "wide" }, html("table", {}, html("tbody", {}, ...Object.entries(values).map(([name, value]) => html("tr", {}, html("th", { scope: "row" }, name), html("td", {}, value))))));
}

function outcomes(names) {
  const last = (name, key) => { const row = (STATE.rows.get(name) ?? []).findLast((each) => each[key] !== undefined); return row?.[key] ?? null; };
  const slowest = Math.max(...names.map((name) => last(name, "seconds") ?? 0));
  const lines = names.map((name) => {
    const run = find(name), seconds = last(name, "seconds");
    return html("tr", {}, html("th", { scope: "row" }, name), html("td", {}, run?.state ?? "–"), ...[shown(run?.ranks), shown(last(name, "update")), percent(last(name, "val_accuracy")),
      shown(last(name, "objective") ?? last(name, "loss")), seconds === null ? "–" : `${shown(seconds)} s`,
      seconds ? `${(slowest / seconds).toFixed(2)} ×` : "–"].map((text) => html("td", { class: "number" }, text)));
  });
  return html("section", { class: "card", id: "outcomes" }, html("h3", {}, "Outcomes"), html("div", { class: "wide" }, html("table", {},
    html("thead", {}, html("tr", {}, ...["run", "state"].map((text) => html("th", { scope: "col" }, text)),
      ...["ranks", "update", "accuracy", "objective", "seconds", "speed-up over the slowest"].map((text) => html("th", { scope: "col", class: "number" }, text)))),
    html("tbody", {}, ...lines))));
}

function compared(names) {
  if (!names.every((name) => STATE.about.has(name))) return [outcomes(names), html("p", { class: "empty" }, "Reading the runs")];
  const all = names.map((name) => STATE.about.get(name)?.options ?? {});
  const keys = [...new Set(all.flatMap((options) => Object.keys(options)))];
  const rows = keys.map((key) => ({ key, cells: all.map((options) => options[key] ?? "–") }))
    .map((row) => ({ ...row, differs: new Set(row.cells).size > 1 })).sort((a, b) => b.differs - a.differs);
  const table = (some) => html("div", { class: "wide" }, html("table", {}, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "option"), ...names.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...some.map((row) => html("tr", { class: row.differs ? "differs" : null }, ...[row.key, ...row.cells].map((text) => html("td", {}, text)))))));
  const differing = rows.filter((row) => row.differs && !["out", "resume"].includes(row.key)); // where a run is, and that it went on
  return [outcomes(names),
    html("section", { class: "card" }, html("h3", {}, "What differs"), differing.length ? table(differing) : html("p", { class: "note" }, "All options are the same.")),
    html("details", { class: "card", id: "options" }, html("summary", {}, "All options"), table(rows))];
}

// ---- the beginning

const THEMES = ["system", "light", "dark"];
function theme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  at("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("theme", name); } catch { /* not kept then */ }
}
let kept = "system";
try { kept = localStorage.getItem("theme") ?? kept; } catch { /* none is kept */ }
theme(THEMES.includes(kept) ? kept : "system");
at("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(at("theme").textContent.slice(7)) + 1) % 3]));
at("filter").addEventListener("input", drawList);

const hash = new URLSearchParams(location.hash.slice(1));
if (OVER[hash.get("over")]) STATE.over = hash.get("over");
fetch("api/runs").then(async (answer) => { STATE.list = await answer.json(); choose(hash.getAll("run")); });
