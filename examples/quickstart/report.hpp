// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "figures.hpp"
#include "report_data.hpp"
#include "report_table.hpp"
#include "svg.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

namespace talpa::examples {

namespace detail {

// The four series colours are of Okabe and Ito (2008), distinguishable with the common colour
// vision deficiencies; shapes and dashes say the same again. Heat maps vary one ink's opacity, so
// darker (on dark: lighter) is more in print and in both modes.
inline constexpr const char* report_style = R"css(
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--muted:#59636e;--rule:#d5dae0;
--grid:#e8ebee;
--lora:#0072b2;--soft:#c04f00;--mola:#00805c;--other:#9a3f7d;--base:#59636e;--heat:#0b3a6f;
--wash:#f5f7f9;--warn:#8a4b00}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ec;--muted:#a0a9b3;
--rule:#3a4149;
--grid:#282d33;--lora:#56b4e9;--soft:#f0a04b;--mola:#3ccb9b;--other:#e191c4;--base:#a0a9b3;
--heat:#9fd0ff;--wash:#1d2126;--warn:#f0b429}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1008px;margin:0 auto;padding:56px 24px 72px}
h1{font-size:28px;line-height:1.25;font-weight:650;margin:0 0 12px;letter-spacing:-.01em}
h2{font-size:19px;font-weight:650;margin:56px 0 10px}
p,ul{margin:0 0 12px;max-width:46em}
ul{padding-left:20px}li{margin:5px 0}
.lead{font-size:17px}
.muted,figcaption,caption,footer{color:var(--muted);font-size:14px}
.warning{border-left:3px solid var(--warn);padding:2px 0 2px 14px;margin:20px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 20px;font-size:14px;margin:24px 0 0;
padding:16px 20px;background:var(--wash);border-radius:6px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums;
border-top:1.5px solid var(--ink);border-bottom:1.5px solid var(--ink)}
caption,figcaption{text-align:left;padding:0 0 10px;max-width:66em}
figcaption{padding:8px 0 0}
caption b,figcaption b{color:var(--ink);font-weight:600}
th,td{padding:6px 0 6px 16px;text-align:right;white-space:nowrap;font-weight:400}
th:first-child,td:first-child{text-align:left;padding-left:2px}
th:last-child,td:last-child{padding-right:2px}
.words{text-align:left}
.even th:not(:first-child){width:9.6%}
thead th{color:var(--muted);border-bottom:1px solid var(--rule);vertical-align:bottom}
tbody.part tr:first-child>*{border-top:1px solid var(--rule)}
td b{font-weight:700}
td .range{color:var(--muted);font-size:12.5px}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:9px}
.dot.soft{border-radius:1px}
.dot.mola{border-radius:0;clip-path:polygon(50% 0,100% 100%,0 100%)}
.dot.other{border-radius:0;clip-path:polygon(50% 0,100% 50%,50% 100%,0 50%)}
.dot.lora{background:var(--lora)}.dot.soft{background:var(--soft)}.dot.mola{background:var(--mola)}
.dot.other{background:var(--other)}
.dot.base{background:none;border:1.5px solid var(--base)}
figure{margin:18px 0 0}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--ink)}
svg .tick{fill:var(--muted);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .strong{fill:var(--ink);font-weight:650}
svg .label{fill:var(--muted);font-size:12.5px}
svg .heading{font-size:13.5px;font-weight:650}
svg .note{font-size:11.5px}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--grid)}.axis{stroke:var(--muted)}
.series{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.series.thin{stroke-width:1.1;opacity:.55}
.whisker{stroke-width:1.4;opacity:.8}
.dash1{stroke-dasharray:7 4}.dash2{stroke-dasharray:2.5 4}.dash3{stroke-dasharray:9 4 1.5 4}
.dash4{stroke-dasharray:1 3.5}
line.lora,polyline.lora{stroke:var(--lora)}line.soft,polyline.soft{stroke:var(--soft)}line.mola,
polyline.mola{stroke:var(--mola)}line.other,polyline.other{stroke:var(--other)}
text.lora,.mark.lora{fill:var(--lora)!important}text.soft,.mark.soft{fill:var(--soft)!important}
text.mola,.mark.mola{fill:var(--mola)!important}
text.other,.mark.other{fill:var(--other)!important}
.mark{stroke:var(--paper);stroke-width:1.4}
.heat{fill:var(--heat)}.frame{fill:none;stroke:var(--rule)}
details{margin:14px 0 0;font-size:14px}summary{cursor:pointer;color:var(--muted)}
details .scroll{margin-top:12px}
footer{margin-top:64px;padding-top:16px;border-top:1px solid var(--rule)}
a{color:inherit}
@media print{main{padding:0;max-width:none}details{display:none}h2,figure,table{break-inside:avoid}}
)css";

inline std::string cell(const std::string& text) { return "<td>" + text + "</td>"; }

/// A mean with half its range over seeds; bold when it is the best of its column.
inline std::string score_cell(const spread& s, std::size_t seeds, bool best) {
  std::string text = percent(s.mean);
  if (best) text = "<b>" + text + "</b>";
  if (seeds > 1) {
    text += " <span class=\"range\">\u00b1" + percent(0.5 * (s.high - s.low)) + "</span>";
  }
  return cell(text);
}

inline std::string method_cell(const method_result& m) {
  return std::string("<td><span class=\"dot ") + family_class(m.family) + "\"></span>" +
         escape_html(m.name) + "</td>";
}

/// Body rows grouped by family, with a rule between the groups.
template <class Row>
std::string grouped_rows(const std::vector<const method_result*>& methods, Row&& row) {
  std::string text;
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const bool first = i == 0 || methods[i - 1]->family != methods[i]->family;
    if (first) text += i == 0 ? "<tbody>\n" : "</tbody>\n<tbody class=\"part\">\n";
    text += row(*methods[i]);
  }
  return text + (methods.empty() ? "<tbody></tbody>\n" : "</tbody>\n");
}

inline std::vector<const method_result*> all_methods(const report_data& data) {
  std::vector<const method_result*> all;
  for (const method_result& m : data.methods) all.push_back(&m);
  return all;
}

/// Largest value over the adapted methods, as it is printed, so that equal prints are equally bold.
template <class Value>
std::string best_of(const report_data& data, Value&& value) {
  double best = -1;
  for (const method_result* m : adapted(data)) best = std::max(best, value(*m));
  return percent(best);
}

inline std::string result_section(const report_data& data) {
  const auto mean = [](const method_result& m) { return m.mean_accuracy().mean; };
  const auto worst = [](const method_result& m) { return m.worst_accuracy().mean; };
  const std::string best_mean = best_of(data, mean);
  const std::string best_worst = best_of(data, worst);
  const std::size_t seeds = data.info.seeds.size();
  std::string text =
      "<h2>Results</h2>\n<div class=\"scroll\"><table>\n<caption><b>Table 1.</b> Trainable "
      "parameters, "
      "active rank and held-out accuracy";
  text += seeds > 1 ? format("; means over %zu seeds, \u00b1 half the range.", seeds) : ".";
  text +=
      " Bold: best of the adapted methods. Seconds are of training one seed.</caption>\n"
      "<thead><tr><th scope=\"col\">method</th><th scope=\"col\">adapters</th>"
      "<th scope=\"col\">router</th><th scope=\"col\">active rank<br/>per token</th>"
      "<th scope=\"col\">mean<br/>accuracy, %</th><th scope=\"col\">worst-task<br/>accuracy, %</th>"
      "<th scope=\"col\" class=\"words\">worst task</th><th "
      "scope=\"col\">seconds</th></tr></thead>\n";
  text += grouped_rows(all_methods(data), [&](const method_result& m) {
    const bool trained = m.family != method_family::frozen;
    const std::string none = "\u2013";
    return "<tr>" + method_cell(m) + cell(trained ? with_thousands(m.adapter_parameters) : none) +
           cell(m.router_parameters > 0 ? with_thousands(m.router_parameters) : none) +
           cell(trained ? fixed(m.active_rank, 1) : none) +
           score_cell(m.mean_accuracy(), m.runs.size(), trained && percent(mean(m)) == best_mean) +
           score_cell(m.worst_accuracy(), m.runs.size(),
                      trained && percent(worst(m)) == best_worst) +
           "<td class=\"words\">" +
           escape_html(tasks[static_cast<std::size_t>(m.worst_task())].name) + "</td>" +
           cell(trained ? fixed(m.seconds().mean, 2) : none) + "</tr>\n";
  });
  text += "</table></div>\n<figure class=\"scroll\">\n" + accuracy_figure(data) +
          "<figcaption><b>Figure 1.</b> Held-out accuracy against what each token uses (left) and "
          "against what is trained and stored (right). ";
  if (seeds > 1) text += "Vertical bars: range over seeds. ";
  text +=
      "Horizontal bars, right: from the adapters alone to adapters and router. Read both columns: "
      "a "
      "sparse mixture looks cheap on the left and a plain adapter on the right.</figcaption>\n"
      "</figure>\n";
  return text;
}

inline std::string task_section(const report_data& data) {
  std::string text =
      "<h2>By instruction</h2>\n<div class=\"scroll\"><table class=\"even\">\n<caption><b>Table "
      "2.</b> Held-out "
      "accuracy of each instruction, %, mean over seeds. Bold: best of the adapted methods. "
      "<i>Most frequent answer</i> looks at no image.</caption>\n<thead><tr>"
      "<th scope=\"col\">method</th>";
  for (const task_definition& t : tasks) {
    text += std::string("<th scope=\"col\">") + escape_html(t.name) + "</th>";
  }
  text += "</tr></thead>\n<tbody><tr><td><span class=\"dot base\"></span>most frequent answer</td>";
  for (const double a : data.majority.accuracy) text += cell(percent(a));
  text += "</tr></tbody>\n";
  std::vector<std::string> best;
  for (index t = 0; t < task_count; ++t) {
    best.push_back(best_of(data, [&](const method_result& m) { return m.accuracy(t).mean; }));
  }
  text += grouped_rows(all_methods(data), [&](const method_result& m) {
    std::string row = "<tr>" + method_cell(m);
    for (index t = 0; t < task_count; ++t) {
      const std::string shown = percent(m.accuracy(t).mean);
      const bool bold =
          m.family != method_family::frozen && shown == best[static_cast<std::size_t>(t)];
      row += cell(bold ? "<b>" + shown + "</b>" : shown);
    }
    return row + "</tr>\n";
  });
  return text + "</table></div>\n";
}

inline std::string loss_section(const report_data& data) {
  std::string text =
      "<h2>Loss</h2>\n<figure class=\"scroll\">\n" + loss_figure(data) +
      "<figcaption><b>Figure 2.</b> Cross-entropy on logarithmic axes that all panels share: mean "
      "over the steps of an epoch (above) and on the held-out questions after it (below), without "
      "the "
      "losses on routers";
  text += data.info.seeds.size() > 1 ? "; mean over seeds." : ".";
  text +=
      "</figcaption>\n</figure>\n<details><summary>Numbers of Figure 2</summary>\n"
      "<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">epoch</th>";
  for (const method_result* m : adapted(data)) {
    text += "<th scope=\"col\">" + escape_html(m->name) + "</th>";
  }
  text += "</tr></thead>\n";
  const struct {
    const char* name;
    std::vector<double> method_run::*curve;
  } curves[] = {{"training, ", &method_run::train_loss},
                {"held-out, ", &method_run::held_out_loss}};
  for (const auto& c : curves) {
    std::vector<std::vector<double>> losses;
    std::size_t epochs = 0;
    for (const method_result* m : adapted(data)) {
      losses.push_back(m->mean_curve(c.curve));
      epochs = std::max(epochs, losses.back().size());
    }
    text += "<tbody class=\"part\">\n";
    for (std::size_t e = 0; e < epochs; ++e) {
      text += "<tr>" + cell(c.name + std::to_string(e + 1));
      for (const std::vector<double>& loss : losses) {
        text += cell(e < loss.size() ? fixed(loss[e], 4) : "\u2013");
      }
      text += "</tr>\n";
    }
    text += "</tbody>\n";
  }
  return text + "</table></div></details>\n";
}

inline std::string routing_section(const report_data& data) {
  const auto methods = routed(data);
  if (methods.empty()) return "";
  std::string text =
      "<h2>Routing</h2>\n<figure class=\"scroll\">\n" + load_figure(data) +
      "<figcaption><b>Figure 3.</b> Share of each expert (columns) in the gates of each "
      "instruction's "
      "held-out tokens (rows)" +
      format("; seed %llu. ", static_cast<unsigned long long>(
                                  data.info.seeds.empty() ? 0 : data.info.seeds.front())) +
      "An expert is called dead below " + percent(dead_share, 0) +
      " % of all gates. A row that differs from its neighbours is an instruction with experts of "
      "its "
      "own.</figcaption>\n</figure>\n<details><summary>Numbers of Figure 3, %</summary>\n"
      "<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">method</th>"
      "<th scope=\"col\" class=\"words\">layer</th><th scope=\"col\" "
      "class=\"words\">instruction</th>";
  index experts = 0;
  for (const method_result* m : methods) {
    for (const layer_routing& layer : m->runs.front().layers) {
      experts = std::max(experts, layer.experts);
    }
  }
  for (index e = 0; e < experts; ++e) text += format("<th scope=\"col\">%td</th>", e);
  text += "</tr></thead>\n";
  for (const method_result* m : methods) {
    for (const layer_routing& layer : m->runs.front().layers) {
      text += "<tbody class=\"part\">\n";
      for (index t = 0; t < task_count; ++t) {
        text += "<tr>" + cell(escape_html(m->name)) + "<td class=\"words\">" +
                escape_html(layer.layer) + "</td><td class=\"words\">" +
                escape_html(tasks[static_cast<std::size_t>(t)].name) + "</td>";
        for (index e = 0; e < experts; ++e) {
          text += cell(e < layer.experts ? percent(layer.load_at(t, e)) : "\u2013");
        }
        text += "</tr>\n";
      }
      text += "</tbody>\n";
    }
  }
  text +=
      "</table></div></details>\n<figure class=\"scroll\">\n" + entropy_figure(data) +
      "<figcaption><b>Figure 4.</b> Entropy of the softmax of the router's scores, over ln E, mean "
      "over the held-out tokens: 1 is undecided, 0 is certain. Epoch 0 is before training.";
  text += data.info.seeds.size() > 1 ? " First seed.</figcaption>\n" : "</figcaption>\n";
  text +=
      "</figure>\n<div class=\"scroll\"><table style=\"margin-top:28px\">\n<caption><b>Table "
      "3.</b> "
      "Routers after training";
  text += data.info.seeds.size() > 1 ? "; means over seeds, except dead experts: each seed." : ".";
  text +=
      "</caption>\n<thead><tr><th scope=\"col\">method</th>"
      "<th scope=\"col\" class=\"words\">layer</th><th scope=\"col\">entropy<br/>before</th>"
      "<th scope=\"col\">entropy<br/>after</th><th scope=\"col\">largest<br/>share, %</th>"
      "<th scope=\"col\">dead<br/>experts</th></tr></thead>\n";
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const method_result& m = *methods[i];
    text += i == 0 ? "<tbody>\n" : "<tbody class=\"part\">\n";
    for (std::size_t l = 0; l < m.runs.front().layers.size(); ++l) {
      const auto entropy = [&](bool last) {
        return m
            .over_seeds([&](const method_run& run) {
              const std::vector<double>& h = run.layers[l].entropy;
              return h.empty() ? std::numeric_limits<double>::quiet_NaN()
                     : last    ? h.back()
                               : h.front();
            })
            .mean;
      };
      std::string dead;
      for (const method_run& run : m.runs) {
        dead += (dead.empty() ? "" : ", ") + std::to_string(run.layers[l].dead());
      }
      text += "<tr>" + (l == 0 ? method_cell(m) : cell("")) + "<td class=\"words\">" +
              escape_html(m.runs.front().layers[l].layer) + "</td>" +
              cell(fixed(entropy(false), 3)) + cell(fixed(entropy(true), 3)) +
              cell(percent(m.over_seeds([&](const method_run& run) {
                              return run.layers[l].largest_share();
                            }).mean)) +
              cell(dead + format(" of %td", m.runs.front().layers[l].experts)) + "</tr>\n";
    }
    text += "</tbody>\n";
  }
  return text + "</table></div>\n";
}

/// Accuracies of methods that have equal `cost`, at the smallest such cost, best first (ranks of
/// one method alone are no comparison): `At active rank 2.0: A has 92.2 %, B has 76.2 %. `; empty
/// without such a pair.
template <class Cost, class Words>
std::string matched(const report_data& data, Cost&& cost, Words&& words) {
  std::vector<const method_result*> found;
  for (const method_result* m : adapted(data)) {
    std::vector<const method_result*> equal;
    bool methods = false;
    for (const method_result* other : adapted(data)) {
      if (!(std::fabs(cost(*other) - cost(*m)) <= 0.05)) continue;
      equal.push_back(other);
      methods = methods || other->family != m->family || (other != m && !is_series(m->family));
    }
    if (methods && (found.empty() || cost(*m) < cost(*found.front()))) found = equal;
  }
  if (found.empty()) return "";
  std::stable_sort(found.begin(), found.end(), [](const method_result* a, const method_result* b) {
    return a->mean_accuracy().mean > b->mean_accuracy().mean;
  });
  std::string text = "At " + words(*found.front()) + ": ";
  for (const method_result* m : found) {
    text += (m == found.front() ? "" : ", ") + escape_html(m->name) + " has " +
            percent(m->mean_accuracy().mean) + "\u00a0%";
  }
  return text + ". ";
}

/// What the numbers say, in words that hold for any numbers.
inline std::string findings(const report_data& data) {
  const method_result* best = nullptr;
  const method_result* best_worst = nullptr;
  for (const method_result* m : adapted(data)) {
    if (best == nullptr || m->mean_accuracy().mean > best->mean_accuracy().mean) best = m;
    if (best_worst == nullptr || m->worst_accuracy().mean > best_worst->worst_accuracy().mean) {
      best_worst = m;
    }
  }
  if (best == nullptr) return "";
  const auto cost = [](const method_result& m) {
    return with_thousands(m.trainable()) + " trainable parameters, active rank " +
           fixed(m.active_rank, 1);
  };
  std::string text = "<p class=\"lead\">Highest mean accuracy: <b>" + escape_html(best->name) +
                     "</b>, " + percent(best->mean_accuracy().mean) + "\u00a0% (" + cost(*best) +
                     "). ";
  if (best == best_worst) {
    text +=
        "It is also best on its worst task, " + percent(best->worst_accuracy().mean) + "\u00a0%. ";
  } else {
    text += "Best on its worst task: <b>" + escape_html(best_worst->name) + "</b>, " +
            percent(best_worst->worst_accuracy().mean) + "\u00a0% (" + cost(*best_worst) + "). ";
  }
  text += "</p>\n";
  const std::string by_rank = matched(
      data, [](const method_result& m) { return m.active_rank; },
      [](const method_result& m) { return "active rank " + fixed(m.active_rank, 1); });
  const std::string by_size = matched(
      data, [](const method_result& m) { return static_cast<double>(m.adapter_parameters); },
      [](const method_result& m) {
        return with_thousands(m.adapter_parameters) + " adapter parameters, routers not counted";
      });
  if (!by_rank.empty() || !by_size.empty()) text += "<p>" + by_rank + by_size + "</p>\n";
  return text;
}

inline std::string fact(const char* name, const std::string& value) {
  return std::string("<dt>") + name + "</dt><dd>" +
         (value.empty() ? "\u2013" : escape_html(value)) + "</dd>\n";
}

}  // namespace detail

/// The report: one self-contained HTML page (well-formed as XML too), without scripts and without
/// anything to load.
inline std::string report_html(const report_data& data) {
  std::string seeds;
  for (const std::uint64_t s : data.info.seeds) {
    seeds += (seeds.empty() ? "" : ", ") + std::to_string(s);
  }
  std::string text =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
      "'unsafe-inline'\"/>\n<title>Eight instructions, one frozen network</title>\n<style>";
  text += detail::report_style;
  text +=
      "</style>\n</head>\n<body>\n<main>\n<header>\n<h1>Eight instructions, one frozen "
      "network</h1>\n"
      "<p>A small network learned to name handwritten digits and was frozen. Low-rank adapters "
      "then "
      "teach it eight instructions about the same images: plain LoRA, or mixtures of LoRA experts "
      "under several routers.</p>\n";
  text += detail::findings(data);
  if (data.quick) {
    text +=
        "<p class=\"warning\">Short run (--quick): the figures show what the full run shows, and "
        "their numbers prove nothing.</p>\n";
  }
  if (!data.info.optimised) {
    text += "<p class=\"warning\">Not an optimised build: seconds mean nothing.</p>\n";
  }
  text +=
      "<dl>\n" + detail::fact("talpa", data.info.version) +
      detail::fact("compiler", data.info.compiler) +
      detail::fact("build",
                   data.info.build_type + (data.info.flags.empty() ? "" : ": " + data.info.flags)) +
      detail::fact("instruction set", data.info.isa) + detail::fact("device", data.info.device) +
      detail::fact("threads", std::to_string(data.info.threads)) +
      detail::fact(data.info.seeds.size() == 1 ? "seed" : "seeds", seeds) +
      detail::fact("arguments", data.info.command) + detail::fact("started", data.info.started) +
      detail::fact("whole run", duration(data.total_seconds)) + "</dl>\n</header>\n";
  text += detail::result_section(data) + detail::task_section(data) + detail::loss_section(data) +
          detail::routing_section(data);

  text += "<h2>How it was measured</h2>\n<ul>\n<li>";
  text +=
      with_thousands(data.train_images) + " images to train on, " +
      with_thousands(data.held_out_images) +
      " held out, split by image within each digit; each seed has its own split, its own "
      "pretrained base and its own adapters. Each image is asked all eight instructions, so there "
      "are " +
      with_thousands(data.train_images * task_count) + " training questions and " +
      with_thousands(data.held_out_images * task_count) + " held-out ones.</li>\n<li>";
  text +=
      "Base: " + escape_html(data.network) + ", " + with_thousands(data.base_parameters) +
      " parameters, pretrained on <i>name</i> for " + std::to_string(data.pretrain_epochs) +
      " epochs and then frozen. The instruction is a one-hot of eight beside the 64 pixels.</li>\n";
  text +=
      "<li>All methods: the same layers adapted, the same " + std::to_string(data.epochs) +
      " epochs, batches of " + std::to_string(data.batch) + ", optimiser and schedule (peak " +
      format("%g", data.learning_rate) +
      "), in the same order of questions for the same seed; alpha / r is 2 everywhere. No setting "
      "is of "
      "one method alone, except those of its router; load balance losses have the weight " +
      format("%g", data.balance) + ". Nothing is stopped early, the last epoch is reported.</li>\n";
  for (const std::string& s : data.settings) text += "<li>" + escape_html(s) + "</li>\n";
  text +=
      "<li>A token is one question. Active rank: the rank of the experts that a token uses, mean "
      "over held-out tokens and adapted layers.</li>\n"
      "<li>An answer is the largest of ten outputs, whatever the instruction. Mean accuracy weighs "
      "the instructions equally; worst-task accuracy takes of each seed its lowest.</li>\n"
      "<li>The answers follow from the digit: <i>loops</i> is 1 for 0, 6 and 9, 2 for 8, else 0 (a "
      "handwritten 4 is open); <i>successor</i> of 9 is 0; <i>complement</i> is 9 minus the digit; "
      "primes are 2, 3, 5 and 7.</li>\n"
      "<li>The images do not say who wrote them, so both sides of the split share writers. These "
      "are small numbers about a small problem: they show how to measure, not which method "
      "wins.</li>\n</ul>\n"
      "<footer>Images: \u201cOptical Recognition of Handwritten Digits\u201d, E. Alpaydin and C. "
      "Kaynak, 1998, UCI Machine Learning Repository, CC BY 4.0. Made by examples/quickstart of "
      "talpa " +
      escape_html(data.info.version) + ".</footer>\n</main>\n</body>\n</html>\n";
  return text;
}

}  // namespace talpa::examples
