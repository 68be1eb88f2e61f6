// Theme, search, sorting, filtering and zoom. Every page can be read without any of it.
"use strict";

const root = document.documentElement;

function remember(name, value) {
  try {
    if (value === undefined) return window.localStorage.getItem(name);
    window.localStorage.setItem(name, value);
  } catch (error) {
    // Some browsers keep nothing for pages opened as files.
  }
  return null;
}

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const kept = remember("rodimus-lab-theme");
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember("rodimus-lab-theme", root.dataset.theme);
    show();
  });
  show();
}

const SHOWN = 12;  // of the pages found
const isLetter = (character) => /[\p{L}\p{N}+_-]/u.test(character);

// 3 for a word of the text, 2 for the beginning of one, 1 for letters inside of one.
function standing(word, text) {
  let best = 0;
  for (let at = text.indexOf(word); at >= 0 && best < 3; at = text.indexOf(word, at + 1)) {
    const begins = !isLetter(text.charAt(at - 1)), ends = !isLetter(text.charAt(at + word.length));
    best = Math.max(best, begins ? (ends ? 3 : 2) : 1);
  }
  return best;
}

// Pages that have every word: those first that have them in their titles, of these the shorter titles; else the site's order.
function found(words) {
  const scored = [];
  for (const page of window.rodimusLabPages || []) {
    page.lower ||= [page.title.toLowerCase(), page.text.toLowerCase()];
    const scores = words.map((word) => 10 * standing(word, page.lower[0]) || standing(word, page.lower[1]));
    const score = scores.reduce((a, b) => a + b);
    if (scores.every(Boolean)) scored.push([score + (score >= 10 ? 1 / page.title.length : 0), page]);
  }
  return scored.sort((a, b) => b[0] - a[0]).map((pair) => pair[1]);
}

// The words of the page's text around the first that its title has not.
function excerpt(page, words) {
  const [title, text] = page.lower;
  const at = text.indexOf(words.find((word) => !title.includes(word)) ?? "\n");
  if (at < 0) return "";
  const from = at < 50 ? 0 : page.text.indexOf(" ", at - 50) + 1;
  return (from ? "… " : "") + page.text.slice(from, at + 70) + (at + 70 < text.length ? " …" : "");
}

function linkTo(page, words) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  const kind = document.createElement("span");
  const around = document.createElement("small");
  link.href = root.dataset.root + page.address;
  link.textContent = page.title + " ";
  kind.textContent = page.kind;
  around.textContent = excerpt(page, words);
  link.append(kind, around);
  item.append(link);
  return item;
}

function setUpSearch() {
  const input = document.getElementById("search");
  const list = document.getElementById("found");
  const count = document.getElementById("found-count");
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const pages = words.length ? found(words) : [];
    const few = pages.slice(0, SHOWN);
    list.replaceChildren(...few.map((page) => linkTo(page, words)));
    list.hidden = !few.length;
    const more = few.length < pages.length ? `, the first ${SHOWN} are shown` : "";
    count.textContent = words.length ? `${pages.length || "no"} page${pages.length === 1 ? "" : "s"} found${more}` : "";
    count.classList.toggle("unseen", few.length > 0 || !words.length);
  };
  input.addEventListener("input", search);
  input.addEventListener("focus", search);
  input.form.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !input.form.contains(event.relatedTarget)) list.hidden = true;
  });
  const links = () => [...list.querySelectorAll("a")];
  input.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const [first] = links();
    if (first) window.location.href = first.href;
  });
  input.form.addEventListener("keydown", (event) => {
    const at = links().indexOf(document.activeElement);
    if (event.key === "Escape") {
      input.focus();
      list.hidden = true;
    } else if (event.key === "ArrowDown" && links()[at + 1]) {
      list.hidden = false;
      links()[at + 1].focus();
      event.preventDefault();
    } else if (event.key === "ArrowUp" && at >= 0) {
      (links()[at - 1] || input).focus();
      event.preventDefault();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) {
      input.focus();
      event.preventDefault();
    }
  });
  document.addEventListener("click", (event) => {
    if (!input.form.contains(event.target)) list.hidden = true;
  });
}

function keyOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim();
  const number = text === "" ? NaN : Number(text);
  return { text, number, missing: text === "" };
}

function order(a, b) {
  if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return a.number - b.number;
  return a.text.localeCompare(b.text, "en", { numeric: true });
}

function setUpSorting(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    // Chromium repeats a head on every printed page, but no button in it.
    window.addEventListener("beforeprint", () => head.prepend(...button.childNodes));
    window.addEventListener("afterprint", () => button.append(...[...head.childNodes].filter((one) => one !== button)));
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
      rows.sort(([a], [b]) => a.missing - b.missing || (up ? order(a, b) : order(b, a)));
      body.append(...rows.map((pair) => pair[1]));
    });
  });
}

function setUpFilter(input) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const count = document.getElementById(input.id + "-count");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? shown + " of " + rows.length : "";
  });
}

function setUpZoom(dialog) {
  const picture = document.createElement("img");
  const stage = dialog.querySelector(".stage");
  stage.append(picture);
  let scale = 1, x = 0, y = 0, held = null;
  const place = () => { picture.style.transform = `translate(${x}px, ${y}px) scale(${scale})`; };
  const zoom = (factor, atX, atY) => {
    const next = Math.min(12, Math.max(1, scale * factor));
    x = next === 1 ? 0 : atX - (atX - x) * next / scale;
    y = next === 1 ? 0 : atY - (atY - y) * next / scale;
    scale = next;
    place();
  };
  const middle = () => [stage.clientWidth / 2, stage.clientHeight / 2];
  const doing = {
    in: () => zoom(1.5, ...middle()),
    out: () => zoom(1 / 1.5, ...middle()),
    reset: () => { scale = 1; x = y = 0; place(); },
    close: () => dialog.close(),
  };
  for (const link of document.querySelectorAll("a.zoom")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      picture.src = link.href;
      picture.alt = link.querySelector("img").alt;
      doing.reset();
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    const act = doing[event.target.dataset.do];
    if (act) act();
  });
  dialog.addEventListener("keydown", (event) => {
    const act = { "+": "in", "=": "in", "-": "out", "0": "reset" }[event.key];
    const move = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (act) doing[act]();
    if (move) { x += move[0]; y += move[1]; place(); }
    if (act || move) event.preventDefault();
  });
  stage.addEventListener("wheel", (event) => {
    const box = stage.getBoundingClientRect();
    zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - box.left, event.clientY - box.top);
    event.preventDefault();
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    held = [event.clientX - x, event.clientY - y];
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (held) { x = event.clientX - held[0]; y = event.clientY - held[1]; place(); }
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { held = null; });
}

setUpTheme();
setUpSearch();
document.querySelectorAll("table.sortable").forEach(setUpSorting);
document.querySelectorAll("input[data-filters]").forEach(setUpFilter);
document.querySelectorAll("dialog").forEach(setUpZoom);
