/* Chooses a network in the plots, by click, tap, arrow keys or the table, and shows it in a card; saves figures.
   Without this script the plots and the table stand as they are. Text is only ever set as text. */
(function () {
  "use strict";
  var SVG = "http://www.w3.org/2000/svg";

  function element(name, content, attributes) {
    var made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    for (var key in attributes || {}) made.setAttribute(key, attributes[key]);
    return made;
  }

  function shape(name, attributes, parent, content) {
    var made = document.createElementNS(SVG, name);
    for (var key in attributes) made.setAttribute(key, attributes[key]);
    if (content !== undefined) made.textContent = content;
    return parent.appendChild(made);
  }

  // 1. Every figure can be saved as it is seen, with the colours that it has now.
  function saved(svg) {
    var copy = svg.cloneNode(true), now = getComputedStyle(document.documentElement), rules = [], names = {};
    copy.querySelectorAll(".ring").forEach(function (ring) { ring.remove(); });
    Array.prototype.forEach.call(document.styleSheets[0].cssRules, function (rule) {
      if (rule.selectorText && rule.selectorText.indexOf("svg") === 0) rules.push(rule.cssText);
    });
    (rules.join(" ") + " var(--page)").replace(/--\w+/g, function (name) { names[name] = now.getPropertyValue(name).trim(); });
    var values = Object.keys(names).map(function (name) { return name + ":" + names[name]; }).join(";");
    var box = svg.viewBox.baseVal, style = document.createElementNS(SVG, "style");
    style.textContent = ":root{" + values + ";background:var(--page);font-family:system-ui,sans-serif} " + rules.join(" ");
    copy.insertBefore(style, copy.firstChild);
    copy.setAttribute("xmlns", SVG);
    copy.setAttribute("width", 2 * box.width);
    copy.setAttribute("height", 2 * box.height);
    ["tabindex", "role", "data-plot"].forEach(function (name) { copy.removeAttribute(name); });
    return new XMLSerializer().serializeToString(copy);
  }

  document.querySelectorAll("figure[data-name]").forEach(function (figure) {
    var button = element("button", "Save as SVG", { type: "button" });
    button.addEventListener("click", function () {
      var address = URL.createObjectURL(new Blob([saved(figure.querySelector("svg"))], { type: "image/svg+xml" }));
      var link = element("a", "", { href: address, download: figure.dataset.name + ".svg" });
      link.click();
      setTimeout(function () { URL.revokeObjectURL(address); }, 1000);
    });
    var caption = figure.querySelector("figcaption") || figure.appendChild(element("figcaption"));
    caption.append(" ", button);
  });

  // 2. The networks.
  var holder = document.getElementById("front-data");
  if (!holder) return;
  var data = JSON.parse(holder.textContent), selected = -1;
  var items = data.items.map(function (row) {
    var item = {};
    data.columns.forEach(function (name, at) { item[name] = row[at]; });
    item.share = (100 * item.params[0] / data.base.params).toPrecision(3) + " %";
    return item;
  });
  var card = document.getElementById("card"), table = document.querySelector("table.front");
  var plots = Array.prototype.slice.call(document.querySelectorAll("svg[data-plot]"));
  // The folder of the run is where this page lies; a page that came over a network does not know it.
  var folder = location.protocol === "file:" ? decodeURIComponent(location.pathname).replace(/\/[^\/]*$/, "") : "RUN";
  if (/^\/[A-Za-z]:\//.test(folder)) folder = folder.slice(1);
  if (/[^\w\/.:+@%,=-]/.test(folder)) folder = "'" + folder.replace(/'/g, "'\\''") + "'";

  function layers(item) {
    if (!item.layers) return null;
    var found = [];
    for (var at = 0; at < item.layers.length; at += data.digits)
      found.push(data.sizes[parseInt(item.layers.slice(at, at + data.digits), 36)]);
    return found;
  }

  function runs(values) {
    var parts = [];
    values.forEach(function (value) {
      var last = parts[parts.length - 1];
      if (last && last[0] === value) last[1] += 1; else parts.push([value, 1]);
    });
    return parts.map(function (part) { return (part[1] > 1 ? part[1] + "x" : "") + part[0]; }).join(" ");
  }

  function picture(sizes, base) {
    var svg = document.createElementNS(SVG, "svg"), step = 340 / sizes.length, bar = Math.min(step * 0.72, 30);
    svg.setAttribute("viewBox", "0 0 400 170");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "sizes of every layer");
    [["KV heads", 1, 18, 45], ["FFN width", 2, 90, 72]].forEach(function (panel) {
      var most = Math.max.apply(null, base.map(function (layer) { return layer[panel[1]]; })) || 1, bottom = panel[2] + panel[3];
      shape("text", { x: 0, y: panel[2] - 7 }, svg, panel[0] + ", of " + most);
      sizes.forEach(function (layer, index) {
        var left = (index + 0.5) * step - bar / 2 + 4, group = shape("g", {}, svg), whole = base[index][panel[1]];
        shape("title", {}, group, "layer " + index + ": " + layer[panel[1]] + " of " + whole);
        [["outline", whole], ["bar", layer[panel[1]]]].forEach(function (part) {
          var tall = panel[3] * part[1] / most;
          if (tall) shape("rect", { "class": part[0], x: left, y: bottom - tall, width: bar, height: tall }, group);
        });
      });
    });
    return svg;
  }

  function show(item) {
    var facts = element("dl"), side = element("div"), sizes = layers(item);
    function fact(name, value) {
      if (value) facts.append(element("dt", name), element("dd", value));
    }
    fact("parameters", item.params[1] + " (" + item.share + " of the base)");
    fact("quality", item.quality[1] + (item.kind === "screened" ? ", of part of the documents" : ""));
    fact("decode speed", item.speed);
    data.further.forEach(function (name, at) {
      if (item.further[at] !== null) fact(name.replace(/_/g, " "), String(item.further[at]));
    });
    data.tasks.forEach(function (task, at) { fact(task, item.tasks[at]); });
    fact("how it came", item.about);
    if (sizes) {
      fact("layers", sizes.filter(function (s) { return s[1] || s[2]; }).length + " of " + data.base.layers);
      fact("FFN width", runs(sizes.map(function (s) { return s[2]; })));
      fact("KV heads", runs(sizes.map(function (s) { return s[1]; })));
      if (sizes.some(function (s) { return s[3]; })) fact("experts", runs(sizes.map(function (s) { return s[3]; })));
      if (sizes.some(function (s) { return s[4] || s[5]; })) {
        fact("attention bits", runs(sizes.map(function (s) { return s[4]; })));
        fact("FFN bits (0: as stored)", runs(sizes.map(function (s) { return s[5]; })));
      }
      side.append(picture(sizes, layers(items[0])));
    }
    fact("key", item.key);
    var parts = element("div"), title = item.name || (item.key ? "sub-network " + item.key : "");
    parts.append(facts, side);
    card.replaceChildren(element("h3", title), parts);
    if (item.key && item.kind !== "screened") {
      var command = "compressor pick " + folder + " --key " + item.key + "\ncompressor export " + folder +
        "\ncompressor report " + folder;
      var copy = element("button", "Copy", { type: "button" }), box = element("pre", command);
      copy.addEventListener("click", function () {
        var range = document.createRange();
        range.selectNodeContents(box);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        copy.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
      });
      card.append(element("p", item.kind === "chosen" ? "It is packaged. To package it again: " : "To package it: "), box);
      card.querySelector("p").append(copy);
    } else if (item.kind === "screened") {
      card.append(element("p", "It was scored on part of the documents only, so it is not offered for packaging."));
    }
    card.hidden = false;
  }

  // 3. One network is selected; both plots and the table show which.
  function centre(dot) {
    var box = dot.getBBox();
    return [box.x + box.width / 2, box.y + box.height / 2];
  }

  var places = plots.map(function (plot) {
    var found = {};
    plot.querySelectorAll("[data-i]").forEach(function (dot) { found[dot.dataset.i] = centre(dot); });
    return found;
  });

  function select(number) {
    selected = number;
    plots.forEach(function (plot, at) {
      var ring = plot.querySelector(".ring") || shape("circle", { "class": "ring", r: 10 }, plot), place = places[at][number];
      ring.style.display = place ? "" : "none";
      if (place) { ring.setAttribute("cx", place[0]); ring.setAttribute("cy", place[1]); }
    });
    table.querySelectorAll("tr[data-i]").forEach(function (row) {
      row.classList.toggle("selected", Number(row.dataset.i) === number);
    });
    show(items[number]);
  }

  plots.forEach(function (plot, at) {
    var here = places[at], order = Object.keys(here).map(Number).sort(function (a, b) {
      return here[a][0] - here[b][0] || here[b][1] - here[a][1];
    });
    plot.setAttribute("tabindex", "0");
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-label", plot.getAttribute("aria-label") + ": left and right arrow keys choose a network");

    function nearest(event, reach) {
      var to = plot.getScreenCTM().inverse(), point = new DOMPoint(event.clientX, event.clientY).matrixTransform(to);
      var best = -1, least = reach * reach;
      order.forEach(function (number) {
        var dx = here[number][0] - point.x, dy = here[number][1] - point.y;
        if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = number; }
      });
      return best;
    }
    plot.addEventListener("click", function (event) {
      var number = nearest(event, 30);
      if (number >= 0) select(number);
    });
    plot.addEventListener("keydown", function (event) {
      var step = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1 }[event.key], now = order.indexOf(selected);
      if (event.key === "Home") now = -1, step = 1;
      else if (event.key === "End") now = order.length, step = -1;
      if (!step) return;
      event.preventDefault();
      now += step;
      if (now >= 0 && now < order.length) select(order[now]);
    });
    var tip = shape("title", {}, plot);
    plot.addEventListener("pointermove", function (event) {
      var item = items[nearest(event, 12)];
      tip.textContent = item ? [item.name, item.share + " of the parameters", "quality " + item.quality[1], item.speed]
        .filter(Boolean).join("\n") : "";
    });
  });

  // 4. The table: any row can be chosen, all networks be listed, and the rows be sorted.
  var body = table.tBodies[0], more = document.getElementById("front-more");
  function cells(row) {
    var button = element("button", row.cells[0].firstChild.textContent.trim(), { type: "button" });
    row.cells[0].firstChild.replaceWith(button);
    button.addEventListener("click", function () { select(Number(row.dataset.i)); });
  }
  Array.prototype.forEach.call(body.rows, cells);
  more.hidden = body.rows.length === items.length;
  more.addEventListener("click", function () {
    var there = {};
    Array.prototype.forEach.call(body.rows, function (row) { there[row.dataset.i] = true; });
    items.forEach(function (item, number) {
      if (there[number]) return;
      var row = element("tr", undefined, { "data-i": number }), sizes = layers(item);
      var kept = sizes ? sizes.filter(function (s) { return s[1] || s[2]; }).length + " of " + sizes.length : "–";
      var texts = [item.name || item.key, item.params[1], item.quality[1]];
      if (table.dataset.speed) texts.push(item.speed || "–");
      item.further.forEach(function (value) { texts.push(value === null ? "–" : String(value)); });
      texts.push(kept);
      texts.forEach(function (text, at) {
        row.append(element("td", text, at ? { "data-label": table.tHead.rows[0].cells[at].textContent.trim() } : {}));
      });
      row.cells[1].append(element("small", item.share));
      if (item.kind === "screened") row.cells[2].append(element("small", "part of the documents"));
      cells(row);
      body.append(row);
    });
    more.hidden = true;
  });
  function value(row, at) {
    var item = items[row.dataset.i];
    if (at === 1) return item.params[0];
    if (at === 2) return item.quality[0];
    if (at === 3 && table.dataset.speed) return item.speedup === null ? -1 : item.speedup;
    return parseFloat(row.cells[at].textContent) || 0;
  }
  Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell, at) {
    if (!at) return;
    var button = element("button", cell.textContent.trim(), { type: "button", title: "Sort" }), sign = at === 1 ? -1 : 1;
    cell.replaceChildren(button);
    button.addEventListener("click", function () {
      sign = -sign;
      Array.prototype.slice.call(body.rows).sort(function (a, b) { return sign * (value(a, at) - value(b, at)); })
        .forEach(function (row) { body.append(row); });
    });
  });

  var first = items.findIndex(function (item) { return item.kind === "chosen"; });
  select(first < 0 ? 0 : first);
})();
