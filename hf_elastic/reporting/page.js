"use strict";
(() => {
  const colours = {
    light: {
      parent: "#6e7781", found: "#d9480f", front: "#0b63ce", midpoint: "#1a7f37", even: "#8a6100",
      evaluated: "#8c959f", outside: "#8c959f", alternative: "#8e24aa", exact: "#00788a", limit: "#c0271c",
      other: "#57606a", text: "#1b1f24", soft: "#57606a", rule: "#d8dee4", ground: "#ffffff", raised: "#f6f7f9",
      scale: [[0, "#f3f6fa"], [0.5, "#6aa5dd"], [1, "#0a3069"]],
    },
    dark: {
      parent: "#a0a8b3", found: "#ff9354", front: "#6cb6ff", midpoint: "#57d071", even: "#e3b341",
      evaluated: "#7d8590", outside: "#7d8590", alternative: "#d8a0f0", exact: "#45d3e2", limit: "#ff8f85",
      other: "#c4ccd6", text: "#e6e9ed", soft: "#a0a8b3", rule: "#363c46", ground: "#14171c", raised: "#1d2128",
      scale: [[0, "#20262f"], [0.5, "#2f6fb0"], [1, "#b6dcff"]],
    },
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 600px)");
  const figures = JSON.parse(document.getElementById("figures").textContent);

  const painted = (value, theme) => {
    if (typeof value === "string") return value.startsWith("role:") ? theme[value.slice(5)] : value;
    if (Array.isArray(value)) return value.map((one) => painted(one, theme));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, painted(one, theme)]));
  };

  const draw = (slug) => {
    const theme = colours[dark.matches ? "dark" : "light"];
    const { data, layout } = figures[slug];
    const axis = (given) => ({
      gridcolor: theme.rule, linecolor: theme.rule, zerolinecolor: theme.rule, automargin: true, ...given,
      title: { standoff: 10, ...given.title },
    });
    const full = {
      ...layout, paper_bgcolor: theme.ground, plot_bgcolor: theme.ground, dragmode: narrow.matches ? false : "zoom",
      font: { color: theme.text, size: narrow.matches ? 11 : 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 8, r: 12, t: 12, b: 8, autoexpand: true },
      legend: {
        orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", maxheight: 600, entrywidthmode: "pixels",
        font: { size: 12 },
      },
      hoverlabel: { bgcolor: theme.raised, bordercolor: theme.rule, font: { color: theme.text, size: 12 }, align: "left" },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    };
    const chart = document.getElementById(`chart-${slug}`);
    const columns = Math.max(1, Math.floor((chart.clientWidth - 60) / 215));
    const rows = layout.showlegend ? Math.ceil(data.length / columns) : 0;
    if (rows > 2) chart.style.height = `${330 + 21 * rows}px`;
    Plotly.react(chart, painted(data, theme), full, {
      responsive: true, displayModeBar: false,
    });
  };

  const drawAll = () => Object.keys(figures).forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})();
