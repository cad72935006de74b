"use strict";

for (const gallery of document.querySelectorAll(".gallery")) new Gallery(gallery);

/** A gallery: its controls choose which variant lies on the right of every card's divider. */
function Gallery(root) {
  const cards = [...root.querySelectorAll(".card")];
  const radios = [...root.querySelectorAll(".choices input")];
  const sweeps = [...root.querySelectorAll(".sweep")].map((element) => new Sweep(element, show));
  const right = root.querySelector(".right");
  const order = root.querySelector(".order");
  const find = root.querySelector(".find");

  function show(number) {
    for (const radio of radios) radio.checked = Number(radio.value) === number;
    for (const sweep of sweeps) sweep.follow(number);
    for (const card of cards) showIn(card, number);
    right.textContent = nameOf(number);
    sort();
  }

  function nameOf(number) {
    const radio = radios.find((candidate) => Number(candidate.value) === number);
    const sweep = sweeps.find((candidate) => candidate.has(number));
    return sweep ? sweep.describe() : radio ? radio.nextElementSibling.textContent : right.textContent;
  }

  function sort() {
    if (!order || order.value === "given") return;
    const sign = order.value === "gain" ? -1 : 1;
    place([...cards].sort((one, other) => sign * (gainOf(one) - gainOf(other))));
  }

  function place(sorted) {
    root.querySelector(".cards").append(...sorted);
  }

  for (const radio of radios) radio.addEventListener("change", () => show(Number(radio.value)));
  for (const card of cards) addDivider(card.querySelector(".compare"));
  order?.addEventListener("change", () => (order.value === "given" ? place(cards) : sort()));
  find?.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    for (const card of cards) {
      card.hidden = !card.querySelector(".prompt").textContent.toLowerCase().includes(wanted);
    }
  });
  show(Number(root.dataset.first));
}

/** A slider for one weight, or a pad with a slider for each of two. */
function Sweep(root, show) {
  const ranges = [...root.querySelectorAll("input")];
  const values = ranges.map((range) => range.dataset.values.trim().split(" "));
  const variants = root.dataset.variants.split(" ").map(Number);
  const marks = [...root.querySelectorAll(".dot, .cell")];
  const across = Number(ranges[0].max) + 1;

  const position = () => Number(ranges[0].value) + across * Number(ranges[1]?.value ?? 0);

  function write() {
    ranges.forEach((range, axis) => {
      const value = values[axis][Number(range.value)];
      range.nextElementSibling.value = value;
      range.setAttribute("aria-valuetext", value);
    });
  }

  function move(to) {
    ranges[0].value = to % across;
    if (ranges[1]) ranges[1].value = Math.floor(to / across);
    show(variants[to]);
  }

  this.has = (number) => variants.includes(number);
  this.describe = () =>
    ranges.map((range, axis) => {
      const name = range.previousElementSibling.textContent.replace("weight of ", "");
      return `${name} at ${values[axis][Number(range.value)]}`;
    }).join(", ");
  this.follow = (number) => {
    const known = variants[position()] === number ? position() : variants.indexOf(number);
    if (known >= 0) {
      ranges[0].value = known % across;
      if (ranges[1]) ranges[1].value = Math.floor(known / across);
    }
    root.classList.toggle("off", known < 0);
    marks.forEach((mark, index) => mark.classList.toggle("on", index === known));
    write();
  };

  for (const range of ranges) range.addEventListener("input", () => show(variants[position()]));
  const picture = root.querySelector(".curve, .pad");
  if (picture) dragOver(picture, marks, move);
}

/** Dragging over a curve or a pad moves to the nearest of its marks. */
function dragOver(picture, marks, move) {
  const away = (mark, event) => {
    const box = mark.getBoundingClientRect();
    const x = box.x + box.width / 2 - event.clientX;
    const y = mark.classList.contains("dot") ? 0 : box.y + box.height / 2 - event.clientY;
    return x * x + y * y;
  };
  const choose = (event) => {
    const distances = marks.map((mark) => away(mark, event));
    move(distances.indexOf(Math.min(...distances)));
  };
  picture.addEventListener("pointerdown", (event) => {
    picture.setPointerCapture(event.pointerId);
    choose(event);
  });
  picture.addEventListener("pointermove", (event) => {
    if (picture.hasPointerCapture(event.pointerId)) choose(event);
  });
}

/** A divider: a slider over the picture, whose value is how far the line stands from the left. */
function addDivider(compare) {
  const divider = compare.querySelector(".divider");
  const move = () => compare.style.setProperty("--cut", `${divider.value}%`);
  divider.addEventListener("input", move);
  move();
}

function showIn(card, number) {
  let shown = null;
  for (const image of card.querySelectorAll(".after")) {
    const wanted = image.dataset.of.split(" ").includes(String(number));
    image.hidden = !wanted;
    if (wanted) shown = image;
  }
  const after = card.querySelector(".score-after");
  if (!after) return;
  const before = card.querySelector(".score").textContent;
  after.textContent = shown ? shown.dataset.score : number === 0 ? before : "not drawn";
  const gain = gainOf(card);
  card.querySelector(".gain").textContent = gain > 0 ? "▲" : gain < 0 ? "▼" : "";
}

function gainOf(card) {
  const after = Number(card.querySelector(".score-after").textContent);
  return (after || 0) - Number(card.querySelector(".score").textContent);
}
