// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "report_data.hpp"
#include "svg.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace talpa::examples {

namespace detail {

inline constexpr double figure_width = 960;
inline constexpr double character_width = 6.3;  // of a 12 px label, on average

inline const char* family_class(method_family family) {
  switch (family) {
    case method_family::lora:
      return "lora";
    case method_family::soft_mole:
      return "soft";
    case method_family::mola:
      return "mola";
    case method_family::dynamic:
      return "other";
    case method_family::frozen:
      break;
  }
  return "base";
}

inline drawing::shape family_shape(method_family family) {
  switch (family) {
    case method_family::soft_mole:
      return drawing::shape::square;
    case method_family::mola:
      return drawing::shape::triangle;
    case method_family::dynamic:
      return drawing::shape::diamond;
    default:
      return drawing::shape::circle;
  }
}

inline constexpr method_family adapted_families[] = {method_family::lora, method_family::soft_mole,
                                                     method_family::mola, method_family::dynamic};

/// Whether the methods of a family are one method with several ranks.
inline bool is_series(method_family family) { return family != method_family::dynamic; }

inline std::vector<const method_result*> of_family(const report_data& data, method_family family) {
  std::vector<const method_result*> found;
  for (const method_result& m : data.methods) {
    if (m.family == family) found.push_back(&m);
  }
  return found;
}

inline std::vector<const method_result*> adapted(const report_data& data) {
  std::vector<const method_result*> found;
  for (const method_result& m : data.methods) {
    if (m.family != method_family::frozen) found.push_back(&m);
  }
  return found;
}

inline std::vector<const method_result*> routed(const report_data& data) {
  std::vector<const method_result*> found;
  for (const method_result& m : data.methods) {
    if (m.routed()) found.push_back(&m);
  }
  return found;
}

/// Width of a label of class note, with fonts that are not narrow.
inline double note_width(const std::string& text) {
  double width = 0;
  for (const char c : text) width += c >= 'A' && c <= 'Z' ? 8.5 : 6.2;
  return width;
}

/// Figures with a panel a method have rows of at most this many panels.
inline constexpr std::size_t row_length = 5;

/// The methods in rows; where one row cannot hold all, the other routers begin a row.
inline std::vector<std::vector<const method_result*>> in_rows(
    const std::vector<const method_result*>& methods) {
  std::vector<std::vector<const method_result*>> rows;
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const bool other = i > 0 && is_series(methods[i - 1]->family) != is_series(methods[i]->family);
    if (i == 0 || rows.back().size() == row_length || (other && methods.size() > row_length)) {
      rows.emplace_back();
    }
    rows.back().push_back(methods[i]);
  }
  return rows;
}

inline std::size_t longest(const std::vector<std::vector<const method_result*>>& rows) {
  std::size_t length = 1;
  for (const auto& row : rows) length = std::max(length, row.size());
  return length;
}

/// Row and column of the i-th method.
inline std::pair<std::size_t, std::size_t> place_of(
    const std::vector<std::vector<const method_result*>>& rows, std::size_t i) {
  std::size_t row = 0;
  for (; i >= rows[row].size(); ++row) i -= rows[row].size();
  return {row, i};
}

/// Marker and name of each family, from `x` on.
inline void draw_family_legend(drawing& d, const report_data& data, double x, double y) {
  for (const method_family family : adapted_families) {
    if (of_family(data, family).empty()) continue;
    d.line(x, y, x + 26, y, std::string("series ") + family_class(family));
    d.marker(x + 13, y, family_shape(family), family_class(family));
    d.text(x + 34, y + 4, family_name(family), "label");
    x += 34 + character_width * static_cast<double>(std::string(family_name(family)).size()) + 32;
  }
}

/// One accuracy against one cost, for all adapted methods.
template <class Cost, class LowCost, class Accuracy>
void draw_scatter(drawing& d, const panel& p, const report_data& data, Cost&& cost,
                  LowCost&& low_cost, Accuracy&& accuracy) {
  std::vector<box> taken;  // markers, bars and labels, which a label must not touch
  std::vector<box> lines;  // connecting lines, which it should not
  struct pending {
    double x;
    double y;
    std::string text;
    const char* family;
  };
  std::vector<pending> labels;
  for (const method_family family : adapted_families) {
    const char* name = family_class(family);
    std::vector<drawing::point> line;
    for (const method_result* m : of_family(data, family)) {
      if (p.accepts(cost(*m), accuracy(*m).mean)) {
        line.push_back({p.px(cost(*m)), p.py(accuracy(*m).mean)});
      }
    }
    if (!is_series(family)) continue;
    if (line.size() > 1) d.polyline(line, std::string("series thin ") + name);
    for (std::size_t i = 1; i < line.size(); ++i) {
      constexpr int parts = 24;
      for (int k = 0; k <= parts; ++k) {
        const double at = static_cast<double>(k) / parts;
        const double x = line[i - 1].x + at * (line[i].x - line[i - 1].x);
        const double y = line[i - 1].y + at * (line[i].y - line[i - 1].y);
        lines.push_back({x - 1, y - 1, x + 1, y + 1});
      }
    }
  }
  for (const method_result* m : adapted(data)) {
    const spread a = accuracy(*m);
    if (!p.accepts(cost(*m), a.mean)) continue;
    const char* name = family_class(m->family);
    const double x = p.px(cost(*m));
    const double y = p.py(a.mean);
    if (m->runs.size() > 1) {
      d.line(x, p.py(a.low), x, p.py(a.high), std::string("whisker ") + name);
      taken.push_back({x - 2, p.py(a.high), x + 2, p.py(a.low)});
    }
    if (low_cost(*m) < cost(*m)) {
      const double from = p.px(low_cost(*m));
      d.line(from, y, x, y, std::string("whisker ") + name);
      d.line(from, y - 4, from, y + 4, std::string("whisker ") + name);
      taken.push_back({from, y - 4, x, y + 4});
    }
    taken.push_back({x - 5, y - 5, x + 5, y + 5});
    labels.push_back({x, y, m->label, name});
  }
  for (const method_result* m : adapted(data)) {
    const spread a = accuracy(*m);
    if (!p.accepts(cost(*m), a.mean)) continue;
    d.marker(p.px(cost(*m)), p.py(a.mean), family_shape(m->family), family_class(m->family),
             m->name + ": " + percent(a.mean) + " %");
  }
  // A label takes the first free place round its marker, one that no line crosses if there is one;
  // where none is free, the tip has to do.
  for (const pending& l : labels) {
    const double width = note_width(l.text);
    const struct {
      double left;
      double baseline;
    } places[] = {
        {l.x + 9, l.y + 4},          {l.x - 9 - width, l.y + 4},  {l.x - width / 2, l.y - 10},
        {l.x - width / 2, l.y + 19}, {l.x + 7, l.y - 7},          {l.x + 7, l.y + 16},
        {l.x - 7 - width, l.y - 7},  {l.x - 7 - width, l.y + 16}, {l.x + 9, l.y - 18},
        {l.x + 9, l.y + 27},         {l.x - 9 - width, l.y - 18}, {l.x - 9 - width, l.y + 27},
        {l.x - width / 2, l.y - 23}, {l.x - width / 2, l.y + 32}, {l.x - width / 2, l.y - 36},
        {l.x - width / 2, l.y + 45},
    };
    bool placed = false;
    for (const bool cross_lines : {false, true}) {
      for (const auto& place : places) {
        const box b{place.left, place.baseline - 10, place.left + width, place.baseline + 2};
        const auto meets = [&](const box& other) { return b.meets(other); };
        if (placed || !b.inside(p.area()) || std::any_of(taken.begin(), taken.end(), meets) ||
            (!cross_lines && std::any_of(lines.begin(), lines.end(), meets))) {
          continue;
        }
        taken.push_back(b);
        d.text(place.left, place.baseline, l.text, std::string("note halo ") + l.family);
        placed = true;
      }
    }
  }
}

/// Values of equal kind that an axis has to hold.
struct extent {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return low > high; }
};

}  // namespace detail

/// Accuracy against what is active per token and against what is trained: mean over instructions
/// above, worst instruction below.
inline std::string accuracy_figure(const report_data& data) {
  constexpr double left = 62, top = 44, width = 394, height = 230, across = 86, down = 72;
  drawing d(detail::figure_width, top + 2 * height + down + 52, "Accuracy against cost",
            "Four scatter plots: mean and worst-task held-out accuracy in per cent, against the "
            "active rank per token and against the number of trainable parameters. The numbers are "
            "in Table 1.");
  detail::draw_family_legend(d, data, left, 14);

  // Ticks where methods stand; measured ranks that nearly agree share one, and those of other
  // routers take what room is left.
  std::vector<double> ranks;
  for (const bool series : {true, false}) {
    for (const method_result* m : detail::adapted(data)) {
      const double rank = m->active_rank;
      if (detail::is_series(m->family) != series || !std::isfinite(rank) || rank <= 0) continue;
      const bool near = std::any_of(ranks.begin(), ranks.end(), [&](double taken) {
        return std::fabs(std::log(rank / taken)) <= std::log(series ? 1.2 : 1.3);
      });
      if (!near) ranks.push_back(rank);
    }
  }
  std::sort(ranks.begin(), ranks.end());
  detail::extent parameters;
  for (const method_result* m : detail::adapted(data)) {
    if (m->adapter_parameters > 0) {
      parameters.add(static_cast<double>(m->adapter_parameters));
      parameters.add(static_cast<double>(m->trainable()));
    }
  }
  const scale rank_axis = log_scale_at(ranks);
  const scale parameter_axis = parameters.empty()
                                   ? log_scale(1, 10)
                                   : log_scale(parameters.low / 1.5, parameters.high * 1.5);

  const auto active = [](const method_result& m) { return m.active_rank; };
  const auto total = [](const method_result& m) { return static_cast<double>(m.trainable()); };
  const auto adapters = [](const method_result& m) {
    return static_cast<double>(m.adapter_parameters);
  };
  for (int row = 0; row < 2; ++row) {
    const auto accuracy = [&](const method_result& m) {
      return row == 0 ? m.mean_accuracy() : m.worst_accuracy();
    };
    detail::extent values;
    for (const method_result* m : detail::adapted(data)) {
      values.add(accuracy(*m).low);
      values.add(accuracy(*m).high);
    }
    const scale vertical = values.empty()
                               ? linear_scale(0, 1, 5, 100, 0, 1)
                               : linear_scale(values.low - 0.02, values.high + 0.02, 5, 100, 0, 1);
    const char* name = row == 0 ? "mean accuracy (%)" : "worst-task accuracy (%)";
    const double y = top + row * (height + down);
    const panel by_rank{left, y, width, height, rank_axis, vertical};
    const panel by_size{left + width + across, y, width, height, parameter_axis, vertical};
    by_rank.draw_axes(d, "active rank per token (log scale)", name);
    by_size.draw_axes(d, "trainable parameters, router included (log scale)", name);
    detail::draw_scatter(d, by_rank, data, active, active, accuracy);
    detail::draw_scatter(d, by_size, data, total, adapters, accuracy);
  }
  return std::move(d).finish();
}

/// Loss by epoch, training above and held-out below, one panel a family.
inline std::string loss_figure(const report_data& data) {
  constexpr double left = 62, top = 34, height = 180, room = 60, down = 68;
  constexpr std::vector<double> method_run::*curves[] = {&method_run::train_loss,
                                                         &method_run::held_out_loss};
  std::vector<method_family> families;
  detail::extent losses;
  std::size_t epochs = 1;
  for (const method_family family : detail::adapted_families) {
    const auto methods = detail::of_family(data, family);
    if (!methods.empty()) families.push_back(family);
    for (const method_result* m : methods) {
      for (const auto curve : curves) {
        const std::vector<double> loss = m->mean_curve(curve);
        epochs = std::max(epochs, loss.size());
        for (const double value : loss) {
          if (value > 0) losses.add(value);
        }
      }
    }
  }
  drawing d(detail::figure_width, top + 2 * height + down + 48, "Loss",
            "Cross-entropy by epoch in nats, training above and held-out below; one panel for each "
            "family of methods. The numbers are in the table below the figure.");
  const scale vertical =
      losses.empty() ? log_scale(0.1, 10) : log_scale(losses.low / 1.1, losses.high * 1.1);
  const double count = std::max<double>(1, static_cast<double>(families.size()));
  const double width = (detail::figure_width - left - count * room) / count;
  // Whole epochs on the axis: a step of at least one.
  scale horizontal;
  horizontal.low = 1;
  horizontal.high = std::max<double>(2, static_cast<double>(epochs));
  const double step = std::max(1.0, round_step(horizontal.high / 5));
  for (double at = step > 1 ? step : 1; at <= horizontal.high; at += step) {
    horizontal.ticks.push_back({at, fixed(at, 0)});
  }

  for (std::size_t f = 0; f < families.size(); ++f) {
    const char* name = detail::family_class(families[f]);
    const auto methods = detail::of_family(data, families[f]);
    for (int row = 0; row < 2; ++row) {
      const panel p{left + static_cast<double>(f) * (width + room),
                    top + row * (height + down),
                    width,
                    height,
                    horizontal,
                    vertical};
      const char* vertical_name = row == 0 ? "training loss (nats)" : "held-out loss (nats)";
      p.draw_axes(d, "epoch", f == 0 ? vertical_name : "");
      if (row == 0) d.text(p.x, top - 14, family_name(families[f]), std::string("heading ") + name);
      std::vector<double> ends;
      std::vector<std::string> labels;
      for (std::size_t i = 0; i < methods.size(); ++i) {
        std::vector<drawing::point> line;
        const std::vector<double> loss = methods[i]->mean_curve(curves[row]);
        for (std::size_t e = 0; e < loss.size(); ++e) {
          const auto epoch = static_cast<double>(e + 1);
          if (p.accepts(epoch, loss[e])) line.push_back({p.px(epoch), p.py(loss[e])});
        }
        if (line.empty()) continue;
        d.polyline(line, format("series %s dash%zu", name, (methods.size() - 1 - i) % 5));
        ends.push_back(line.back().y);
        labels.push_back(methods[i]->label);
      }
      const std::vector<double> places = spread_apart(ends, 14, p.y, p.y + height);
      for (std::size_t i = 0; i < places.size(); ++i) {
        d.text(p.x + width + 6, places[i] + 4, labels[i], std::string("note ") + name);
      }
    }
  }
  return std::move(d).finish();
}

/// Share of each expert in the gates of each instruction's held-out tokens; first seed; one column
/// a method, one row a layer; many methods take several such blocks.
inline std::string load_figure(const report_data& data) {
  const auto methods = detail::routed(data);
  const auto blocks = detail::in_rows(methods);
  constexpr double left = 82, top = 84, gap = 24, down = 56, block_gap = 36;
  std::size_t rows = 0;
  double largest = 0;
  index experts = 1;
  for (const method_result* m : methods) {
    rows = std::max(rows, m->runs.front().layers.size());
    for (const layer_routing& layer : m->runs.front().layers) {
      experts = std::max(experts, layer.experts);
      for (const double share : layer.load) {
        if (std::isfinite(share)) largest = std::max(largest, share);
      }
    }
  }
  // Colour runs from nothing to the largest share in any map, rounded up to a tenth.
  const double full = std::max(0.1, std::ceil(largest * 10 - 1e-9) / 10);
  const auto count = static_cast<double>(detail::longest(blocks));
  const double cell = std::min({26.0, (detail::figure_width - left - 2 - gap * (count - 1)) /
                                          (count * static_cast<double>(experts))});
  const double side = cell * static_cast<double>(experts);
  const double tall = cell * static_cast<double>(task_count);
  const double block = static_cast<double>(rows) * (tall + down);
  const auto block_count = std::max<double>(1, static_cast<double>(blocks.size()));
  drawing d(detail::figure_width, top + block_count * (block + block_gap) - block_gap - 4,
            "Load of the experts by instruction",
            "Heat maps, one for each method with a router and each adapted layer: rows are "
            "instructions, columns are experts, the shade is the expert's share of the gates. The "
            "numbers are in the table below the figure.");

  // The colour bar.
  constexpr int shades = 24;
  constexpr double bar = 144;
  d.text(left, 18, "share of the gates", "label");
  const double bar_x = left + 136;
  d.text(bar_x - 8, 18, "0", "tick", "end");
  for (int i = 0; i < shades; ++i) {
    d.rectangle(bar_x + bar / shades * i, 8, bar / shades, 12, "heat",
                static_cast<double>(i) / (shades - 1));
  }
  d.rectangle(bar_x, 8, bar, 12, "frame");
  d.text(bar_x + bar + 8, 18, percent(full, 0) + " %", "tick");

  for (std::size_t i = 0; i < methods.size(); ++i) {
    const auto [b, c] = detail::place_of(blocks, i);
    const double x = left + static_cast<double>(c) * (side + gap);
    const double block_top = top + static_cast<double>(b) * (block + block_gap);
    const auto& layers = methods[i]->runs.front().layers;
    d.text(x, block_top - 22, methods[i]->name,
           std::string("heading ") + detail::family_class(methods[i]->family));
    for (std::size_t r = 0; r < layers.size(); ++r) {
      const layer_routing& layer = layers[r];
      const double y = block_top + static_cast<double>(r) * (tall + down);
      const index dead = layer.dead();
      d.text(x, y - 5, layer.layer, "tick");
      d.text(x + cell * static_cast<double>(layer.experts), y - 5,
             dead == 0 ? "none dead" : format("%td dead", dead), dead == 0 ? "tick" : "tick strong",
             "end");
      for (index t = 0; t < task_count; ++t) {
        const char* name = tasks[static_cast<std::size_t>(t)].name;
        const double row_y = y + cell * static_cast<double>(t);
        if (c == 0) d.text(left - 8, row_y + cell / 2 + 4, name, "tick", "end");
        for (index e = 0; e < layer.experts; ++e) {
          const double share = layer.load_at(t, e);
          if (!std::isfinite(share)) continue;
          d.rectangle(x + cell * static_cast<double>(e), row_y, cell, cell, "heat",
                      std::clamp(share / full, 0.0, 1.0),
                      format("%s, %s, %s: expert %td gets ", methods[i]->name.c_str(),
                             layer.layer.c_str(), name, e) +
                          percent(share) + " %");
        }
      }
      d.rectangle(x, y, cell * static_cast<double>(layer.experts), tall, "frame");
      for (index e = 0; e < layer.experts; ++e) {
        d.text(x + cell * (static_cast<double>(e) + 0.5), y + tall + 14, std::to_string(e), "tick",
               "middle");
      }
      d.text(x + cell * static_cast<double>(layer.experts) / 2, y + tall + 29, "expert", "tick",
             "middle");
    }
  }
  return std::move(d).finish();
}

/// Entropy of each router by epoch, one panel a method; first seed.
inline std::string entropy_figure(const report_data& data) {
  const auto methods = detail::routed(data);
  const auto rows = detail::in_rows(methods);
  constexpr double left = 62, top = 34, height = 170, room = 64, down = 92;
  const auto row_count = std::max<double>(1, static_cast<double>(rows.size()));
  drawing d(
      detail::figure_width, top + row_count * (height + down) - down + 48, "Routing entropy",
      "Normalised entropy of each layer's router on the held-out tokens, from before training "
      "to the last epoch, one panel a method. First and last values are in Table 3.");
  std::size_t epochs = 1;
  for (const method_result* m : methods) {
    for (const layer_routing& layer : m->runs.front().layers) {
      if (!layer.entropy.empty()) epochs = std::max(epochs, layer.entropy.size() - 1);
    }
  }
  scale horizontal;
  horizontal.low = 0;
  horizontal.high = static_cast<double>(epochs);
  const double step = std::max(1.0, round_step(horizontal.high / 4));
  for (double at = 0; at <= horizontal.high; at += step) {
    horizontal.ticks.push_back({at, fixed(at, 0)});
  }
  const scale vertical = linear_scale(0, 1, 5, 1, 0, 1);
  const auto count = static_cast<double>(detail::longest(rows));
  const double width = (detail::figure_width - left - count * room) / count;

  for (std::size_t i = 0; i < methods.size(); ++i) {
    const auto [row, column] = detail::place_of(rows, i);
    const panel p{left + static_cast<double>(column) * (width + room),
                  top + static_cast<double>(row) * (height + down),
                  width,
                  height,
                  horizontal,
                  vertical};
    p.draw_axes(d, "epoch", column == 0 ? "entropy / ln E" : "");
    const char* name = detail::family_class(methods[i]->family);
    d.text(p.x, p.y - 14, methods[i]->name, std::string("heading ") + name);
    std::vector<double> ends;
    std::vector<std::string> labels;
    const auto& layers = methods[i]->runs.front().layers;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      std::vector<drawing::point> line;
      for (std::size_t e = 0; e < layers[l].entropy.size(); ++e) {
        const double value = layers[l].entropy[e];
        if (std::isfinite(value)) line.push_back({p.px(static_cast<double>(e)), p.py(value)});
      }
      if (line.empty()) continue;
      d.polyline(line, format("series %s dash%zu", name, l % 4));
      ends.push_back(line.back().y);
      labels.push_back(layers[l].layer);
    }
    const std::vector<double> places = spread_apart(ends, 14, p.y, p.y + height);
    for (std::size_t l = 0; l < places.size(); ++l) {
      d.text(p.x + width + 6, places[l] + 4, labels[l], std::string("note ") + name);
    }
  }
  return std::move(d).finish();
}

}  // namespace talpa::examples
