// SPDX-License-Identifier: Apache-2.0
#include "../../examples/quickstart/atomic_file.hpp"
#include "../../examples/quickstart/digits.hpp"
#include "../../examples/quickstart/options.hpp"
#include "../../examples/quickstart/progress.hpp"
#include "../../examples/quickstart/report.hpp"
#include "../../examples/quickstart/report_table.hpp"
#include "../../examples/quickstart/run_log.hpp"
#include "../../examples/quickstart/svg.hpp"
#include "../../examples/quickstart/tasks.hpp"

#include <talpa/core/random.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

// Inside the namespace, because POSIX has a function `index` outside.
namespace talpa::examples {

namespace fs = std::filesystem;

namespace {

/// A folder that goes with everything in it.
class scratch_folder {
 public:
  scratch_folder() {
    std::string pattern = (fs::temp_directory_path() / "talpa-quickstart-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  scratch_folder(const scratch_folder&) = delete;
  scratch_folder& operator=(const scratch_folder&) = delete;
  ~scratch_folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

  std::string write(const std::string& name, std::string_view content) const {
    const std::string path = *this / name;
    std::ofstream(path, std::ios::binary).write(content.data(), std::ssize(content));
    return path;
  }
  std::set<std::string> names() const {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(path_)) {
      found.insert(entry.path().filename().string());
    }
    return found;
  }

 private:
  fs::path path_;
};

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// What `call` throws, as "type: text" without the prefix; "nothing" when it does not.
template <class Call>
std::string thrown(Call&& call) {
  try {
    call();
  } catch (const talpa::io_error& e) {
    return std::string("io_error: ") + e.what();
  } catch (const talpa::value_error& e) {
    return std::string("value_error: ") + e.what();
  } catch (const std::exception& e) {
    return std::string("another: ") + e.what();
  }
  return "nothing";
}

/// A row of the file: every pixel is `pixel`, except the first, which tells rows apart.
std::string row_text(int first, int pixel, int label) {
  std::string text = std::to_string(first);
  for (int p = 1; p < pixel_count; ++p) text += "," + std::to_string(pixel);
  return text + "," + std::to_string(label) + "\n";
}

/// Ten rows of each digit, all images different.
std::string valid_text() {
  std::string text;
  for (int i = 0; i < 100; ++i) text += row_text(i % 17, i / 17, i % 10);
  return text;
}

std::string replaced_line(std::string text, int number, const std::string& line) {
  std::size_t begin = 0;
  for (int i = 1; i < number; ++i) begin = text.find('\n', begin) + 1;
  return text.replace(begin, text.find('\n', begin) + 1 - begin, line);
}

std::string shipped_data() {
  return (fs::path(__FILE__).parent_path() / "../../examples/data/digits.csv").string();
}

/// Data of 17 x 17 different images at most, `per_digit` of each digit.
digits made_digits(int per_digit) {
  digits data;
  for (int i = 0; i < 10 * per_digit; ++i) {
    for (int p = 0; p < pixel_count; ++p) {
      data.pixels.push_back(static_cast<std::uint8_t>(p == 0 ? i % 17 : p == 1 ? i / 17 : 0));
    }
    data.labels.push_back(static_cast<std::uint8_t>(i % 10));
  }
  return data;
}

}  // namespace

TEST_SUITE("examples/quickstart/digits") {
  TEST_CASE("load_digits reads the shipped file") {
    const digits data = load_digits(shipped_data());
    REQUIRE(data.rows() == 1797);
    REQUIRE(std::ssize(data.pixels) == 1797 * 64);
    // The class counts that the data set's authors give for their test set.
    const int counts[] = {178, 182, 177, 183, 181, 182, 181, 179, 174, 180};
    for (int d = 0; d < 10; ++d) {
      CHECK(std::count(data.labels.begin(), data.labels.end(), d) == counts[d]);
    }
    // The first line begins 0,0,5,13,9,1 and shows a 0; the last one ends 12,1,0,8.
    CHECK(data.image(0)[2] == 5);
    CHECK(data.image(0)[3] == 13);
    CHECK(data.labels.front() == 0);
    CHECK(data.image(1796)[61] == 12);
    CHECK(data.labels.back() == 8);
  }

  TEST_CASE("load_digits accepts CR LF") {
    const scratch_folder folder;
    std::string text = valid_text();
    for (std::size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += 2) {
      text.insert(at, "\r");
    }
    const digits data = load_digits(folder.write("d.csv", text));
    CHECK(data.rows() == 100);
    CHECK(data.labels[99] == 9);
  }

  TEST_CASE("load_digits names file, line and column of what is wrong") {
    const std::string good = valid_text();
    std::string last_cut = good;
    last_cut.pop_back();
    const auto with_line = [&](int number, const std::string& line) {
      return replaced_line(good, number, line);
    };
    std::string label_16 = row_text(0, 0, 16);
    std::string no_label = row_text(0, 0, 0);
    no_label.erase(no_label.size() - 3, 2);
    const struct {
      std::string content;
      const char* text;
    } cases[] = {
        {"", "is empty, expected at least 100 rows = 10 of each digit"},
        {with_line(7, "0,0,5,13,9,1,0,0,0,0,13,15\n"),
         "line 7 has 12 fields, expected 65 = 64 pixels and a label"},
        {with_line(8, no_label), "line 8 has 64 fields, expected 65 = 64 pixels and a label"},
        {with_line(9, row_text(0, 0, 0).insert(0, "1,")),
         "line 9 has 66 fields, expected 65 = 64 pixels and a label"},
        {with_line(3, "\n"), "line 3 has 0 fields, expected 65 = 64 pixels and a label"},
        {good + "\n", "line 101 has 0 fields, expected 65 = 64 pixels and a label"},
        {good.substr(0, good.size() - 20),
         "line 100 has 56 fields, expected 65 = 64 pixels and a label"},
        {last_cut, "line 100 has no line break, expected one = a complete row"},
        {with_line(5, row_text(17, 0, 0)),
         "line 5 column 1 is 17, expected 0..16 = a pixel's intensity"},
        {with_line(5, row_text(-1, 0, 0)),
         "line 5 column 1 is '-1', expected 0..16 = a pixel's intensity"},
        {with_line(5, label_16), "line 5 column 65 is 16, expected 0..9 = the digit"},
        {with_line(2, row_text(0, 0, 0).insert(2, " ")),
         "line 2 column 2 is ' 0', expected 0..16 = a pixel's intensity"},
        {with_line(2, row_text(0, 0, 0).replace(2, 1, "1.5")),
         "line 2 column 2 is '1.5', expected 0..16 = a pixel's intensity"},
        {with_line(2, row_text(0, 0, 0).replace(2, 1, "")),
         "line 2 column 2 is '', expected 0..16 = a pixel's intensity"},
        {with_line(2, row_text(0, 0, 0).replace(2, 1, "99999999999999999999")),
         "line 2 column 2 is 9999999999999999..., expected 0..16 = a pixel's intensity"},
        {"pixel_0,pixel_1\n" + good,
         "line 1 column 1 is 'pixel_0', expected 0..16 = a pixel's intensity"},
        {std::string("\x7f"
                     "ELF\x02\x01\x01\0\0",
                     9),
         "line 1 column 1 is '\\x7fELF\\x02\\x01\\x01...', expected 0..16 = a pixel's intensity"},
        {row_text(0, 0, 0), "has 1 rows, expected at least 100 = 10 of each digit"},
        {with_line(4, row_text(16, 16, 4)),
         "has 9 rows of the digit 3, expected at least 10 = enough to train on and to hold out"},
    };
    const scratch_folder folder;
    for (const auto& c : cases) {
      const std::string path = folder.write("d.csv", c.content);
      CHECK(thrown([&] { load_digits(path); }) ==
            "io_error: talpa::examples::load_digits: '" + path + "' " + c.text);
    }
  }

  TEST_CASE("the shipped file must be whole, one of the user's own may be shorter") {
    const scratch_folder folder;
    const std::string all = read(shipped_data());
    std::size_t end = 0;
    for (int row = 0; row < 900; ++row) end = all.find('\n', end) + 1;
    const std::string cut = folder.write("digits.csv", all.substr(0, end));
    const options defaults = default_options(fs::path(cut).parent_path().string());
    const auto load = [&](const std::vector<std::string>& arguments) {
      const options settings = parse_options(arguments, defaults);
      return load_digits(settings.data, settings.data_rows).rows();
    };
    const std::string refusal = "io_error: talpa::examples::load_digits: '" + cut +
                                "' has 900 rows, expected 1797 = the whole data set";
    CHECK(thrown([&] { load({}); }) == refusal);
    CHECK(load({"--data", cut}) == 900);
    folder.write("digits.csv", all);
    CHECK(load({}) == 1797);
    folder.write("digits.csv", all + row_text(0, 0, 0));
    CHECK(thrown([&] { load({}); }).find("has 1798 rows, expected 1797") != std::string::npos);
  }

  TEST_CASE("load_digits says why a file cannot be read") {
    const scratch_folder folder;
    const std::string missing = folder / "missing.csv";
    CHECK(thrown([&] { load_digits(missing); }) ==
          "io_error: talpa::examples::load_digits: '" + missing +
              "' is unreadable (No such file or directory), expected a file = 65 integers a line");
    fs::create_directory(folder / "d.csv");
    CHECK(thrown([&] { load_digits(folder / "d.csv"); }) ==
          "io_error: talpa::examples::load_digits: '" + (folder / "d.csv") +
              "' is unreadable (Is a directory), expected a file = 65 integers a line");
    const std::string huge = folder.write("huge.csv", "");
    fs::resize_file(huge, max_data_bytes + 1);
    CHECK(thrown([&] { load_digits(huge); }) ==
          "io_error: talpa::examples::load_digits: '" + huge +
              "' has more than 67108864 bytes, expected at most 67108864 = 64 MiB");
    // A name cannot break the message into lines.
    CHECK(thrown([&] { load_digits("a\nb"); }).find("'a\\x0ab'") != std::string::npos);
  }
}

TEST_SUITE("examples/quickstart/split") {
  TEST_CASE("split_digits takes the same share of every digit and every row once") {
    const digits data = load_digits(shipped_data());
    const data_split split = split_digits(data, 1.0 / 3.0, 1);
    std::vector<index> all = split.train;
    all.insert(all.end(), split.held_out.begin(), split.held_out.end());
    std::sort(all.begin(), all.end());
    REQUIRE(std::ssize(all) == data.rows());
    for (index i = 0; i < data.rows(); ++i) REQUIRE(all[static_cast<std::size_t>(i)] == i);
    CHECK(std::is_sorted(split.train.begin(), split.train.end()));
    CHECK(std::is_sorted(split.held_out.begin(), split.held_out.end()));
    for (int d = 0; d < 10; ++d) {
      const auto rows = std::count(data.labels.begin(), data.labels.end(), d);
      const auto held = std::count_if(split.held_out.begin(), split.held_out.end(), [&](index r) {
        return data.labels[static_cast<std::size_t>(r)] == d;
      });
      CHECK(held == std::llround(static_cast<double>(rows) / 3.0));
    }
  }

  TEST_CASE("split_digits depends on the seed and on nothing else") {
    const digits data = load_digits(shipped_data());
    CHECK(split_digits(data, 0.25, 7).held_out == split_digits(data, 0.25, 7).held_out);
    CHECK(split_digits(data, 0.25, 7).held_out != split_digits(data, 0.25, 8).held_out);
  }

  TEST_CASE("split_digits keeps copies of an image on one side") {
    digits data = made_digits(10);
    // Row i + 100 copies row i; a third of them with another label, as a hand may write 1 like 7.
    const digits once = data;
    data.pixels.insert(data.pixels.end(), once.pixels.begin(), once.pixels.end());
    for (std::size_t i = 0; i < once.labels.size(); ++i) {
      data.labels.push_back(i % 3 == 0 ? static_cast<std::uint8_t>((once.labels[i] + 6) % 10)
                                       : once.labels[i]);
    }
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const data_split split = split_digits(data, 0.3, seed);
      CHECK(split.train.size() + split.held_out.size() == 200);
      CHECK(split.held_out.size() == 60);
      for (const index r : split.held_out) {
        CHECK(std::binary_search(split.held_out.begin(), split.held_out.end(), (r + 100) % 200));
      }
    }
  }

  TEST_CASE("split_digits refuses a fraction that leaves one side empty") {
    const digits data = made_digits(10);
    const std::string prefix =
        "value_error: talpa::examples::split_digits: 'held_out_fraction' is ";
    const std::string rest = ", expected 0 < fraction < 1 = share of the rows";
    CHECK(thrown([&] { split_digits(data, 0.0, 1); }) == prefix + "0.000" + rest);
    CHECK(thrown([&] { split_digits(data, 1.0, 1); }) == prefix + "1.000" + rest);
    CHECK(thrown([&] { split_digits(data, std::nan(""), 1); }) == prefix + "n/a" + rest);
  }

  TEST_CASE("shuffle gives every place to every element") {
    std::vector<int> first_place(5, 0);
    for (std::uint64_t stream = 0; stream < 500; ++stream) {
      std::vector<int> elements = {0, 1, 2, 3, 4};
      shuffle(elements, {1, stream});
      ++first_place[static_cast<std::size_t>(elements.front())];
      std::sort(elements.begin(), elements.end());
      REQUIRE(elements == std::vector<int>{0, 1, 2, 3, 4});
    }
    // Binomial with n = 500 and p = 1/5: six standard deviations, sqrt(500 * 0.2 * 0.8), are 54.
    for (const int count : first_place) CHECK(std::abs(count - 100) < 54);
  }
}

TEST_SUITE("examples/quickstart/tasks") {
  TEST_CASE("the answers follow from the digit") {
    const auto answer = [](index t, int d) {
      return static_cast<int>(
          tasks[static_cast<std::size_t>(t)].answer[static_cast<std::size_t>(d)]);
    };
    REQUIRE(task_count == 8);
    for (int d = 0; d < 10; ++d) {
      CHECK(answer(name_task, d) == d);
      CHECK(answer(1, d) == d % 2);
      CHECK(answer(2, d) == (d >= 5 ? 1 : 0));
      CHECK(answer(3, d) == (d == 8 ? 2 : d == 0 || d == 6 || d == 9 ? 1 : 0));
      CHECK(answer(4, d) == d % 3);
      CHECK(answer(5, d) == (d + 1) % 10);
      CHECK(answer(6, d) == 9 - d);
      CHECK(answer(7, d) == (d == 2 || d == 3 || d == 5 || d == 7 ? 1 : 0));
    }
  }

  TEST_CASE("an input is the pixels in 0..1 and one instruction") {
    const digits data = load_digits(shipped_data());
    std::vector<float> input(static_cast<std::size_t>(input_width), -1.0f);
    write_input(data, {0, 3}, input.data());
    CHECK(input[2] == 5.0f / 16.0f);
    CHECK(input[3] == 13.0f / 16.0f);
    for (index t = 0; t < task_count; ++t) {
      CHECK(input[static_cast<std::size_t>(pixel_count + t)] == (t == 3 ? 1.0f : 0.0f));
    }
    CHECK(*std::min_element(input.begin(), input.end()) == 0.0f);
    CHECK(*std::max_element(input.begin(), input.end()) == 1.0f);
  }

  TEST_CASE("all_examples asks every instruction about every row") {
    const std::vector<example> asked = all_examples({4, 9});
    REQUIRE(asked.size() == 16);
    CHECK(asked[0].row == 4);
    CHECK(asked[7].task == 7);
    CHECK(asked[8].row == 9);
    CHECK(asked[8].task == 0);
  }

  TEST_CASE("predicted_class takes the lower of equals and has no answer for NaN") {
    float logits[10] = {0, 1, 3, 3, -1, 2, 3, 0, 0, 0};
    CHECK(predicted_class(logits) == 2);
    CHECK(predicted_class(logits, 2) == 1);
    logits[9] = std::numeric_limits<float>::quiet_NaN();
    CHECK(predicted_class(logits) == -1);
    std::fill_n(logits, 10, -std::numeric_limits<float>::infinity());
    CHECK(predicted_class(logits) == 0);
  }

  TEST_CASE("ink is a pixel of an image in 0..1") {
    digits data = made_digits(12);
    data.pixels[static_cast<std::size_t>(pixel_count) + 3] = 4;
    CHECK(data.ink(1, 3) == 0.25f);
    CHECK(data.label(1) == data.labels[1]);
  }

  TEST_CASE("evaluate gives an oracle everything and a constant what it deserves") {
    const digits data = made_digits(12);
    const data_split split = split_digits(data, 0.25, 1);
    std::vector<float> logits;
    const auto oracle = [&](const std::vector<example>& asked) {
      logits.assign(asked.size() * 10, 0.0f);
      for (std::size_t i = 0; i < asked.size(); ++i) {
        logits[i * 10 + answer_of(data, asked[i])] = 1.0f;
      }
      return logits.data();
    };
    const task_scores right = evaluate(data, split.held_out, oracle);
    for (const double a : right.accuracy) CHECK(a == 1.0);
    CHECK(right.mean() == 1.0);
    CHECK(right.worst() == 0);

    const auto always_one = [&](const std::vector<example>& asked) {
      logits.assign(asked.size() * 10, 0.0f);
      for (std::size_t i = 0; i < asked.size(); ++i) logits[i * 10 + 1] = 1.0f;
      return logits.data();
    };
    // Three rows of each digit are held out: 1 is right for as many digits as the table has ones.
    const task_scores one = evaluate(data, split.held_out, always_one);
    const double expected[] = {0.1, 0.5, 0.5, 0.3, 0.3, 0.1, 0.1, 0.4};
    for (std::size_t t = 0; t < 8; ++t) CHECK(one.accuracy[t] == doctest::Approx(expected[t]));
    CHECK(one.mean() == doctest::Approx(2.3 / 8));
    CHECK(one.worst() == 0);

    // Every digit is equally frequent: the majority answers are 0 (or 1) for all but the
    // bijections.
    const task_scores floor = majority_scores(data, split);
    const double majority[] = {0.1, 0.5, 0.5, 0.6, 0.4, 0.1, 0.1, 0.6};
    for (std::size_t t = 0; t < 8; ++t) CHECK(floor.accuracy[t] == doctest::Approx(majority[t]));
  }
}

TEST_SUITE("examples/quickstart/options") {
  options parsed(const std::vector<std::string>& arguments) {
    options defaults;
    defaults.data = "digits.csv";
    defaults.methods = {"lora", "soft", "top_p", "dyn_mole"};
    return parse_options(arguments, defaults);
  }

  TEST_CASE("parse_options sets what the flags say and leaves the rest") {
    const options none = parsed({});
    CHECK(none.data == "digits.csv");
    CHECK(none.report == "quickstart.html");
    CHECK(none.log == "quickstart.jsonl");
    CHECK(none.seeds == 2);
    CHECK(none.device == device_name::cpu);
    CHECK_FALSE(none.quiet);

    const options some =
        parsed({"--data", "d", "--report=r", "--log", "l", "--seed=0", "--seeds", "16", "--threads",
                "3", "--device", "gpu", "--pretrain-epochs=4", "--epochs=5", "--batch=64",
                "--learning-rate=1e-2", "--quiet", "--version", "--help"});
    CHECK(some.data == "d");
    CHECK(some.report == "r");
    CHECK(some.log == "l");
    CHECK(some.seed == 0);
    CHECK(some.seeds == 16);
    CHECK(some.threads == 3);
    CHECK(some.device == device_name::gpu);
    CHECK(some.pretrain_epochs == 4);
    CHECK(some.epochs == 5);
    CHECK(some.batch == 64);
    CHECK(some.learning_rate == 1e-2);
    CHECK(some.quiet);
    CHECK(some.version);
    CHECK(some.help);
    CHECK(parsed({"--no-report"}).report.empty());
    CHECK(parsed({"--no-log"}).log.empty());
    CHECK(parsed({"--report=--odd"}).report == "--odd");
    CHECK(parsed({"--seed", "4294967295"}).seed == 4294967295u);
  }

  TEST_CASE("--methods selects, in the order of the tables") {
    using keys = std::vector<std::string>;
    CHECK(parsed({}).methods == keys{"lora", "soft", "top_p", "dyn_mole"});
    CHECK(parsed({"--methods", "top_p"}).methods == keys{"top_p"});
    CHECK(parsed({"--methods=dyn_mole,lora"}).methods == keys{"lora", "dyn_mole"});
    CHECK(default_options("folder", {"a", "b"}).methods == keys{"a", "b"});
  }

  TEST_CASE("--quick shortens what no other flag sets") {
    const options quick = parsed({"--quick", "--epochs", "9"});
    CHECK(quick.quick);
    CHECK(quick.epochs == 9);
    CHECK(quick.seeds == quick_seeds);
    CHECK(quick.pretrain_epochs == quick_pretrain_epochs);
  }

  TEST_CASE("parse_options refuses what it does not understand, in one line") {
    const struct {
      std::vector<std::string> arguments;
      const char* text;
    } cases[] = {
        {{"--sed", "1"}, "'--sed' is unknown, expected '--seed' = the nearest flag"},
        {{"--no_report"}, "'--no_report' is unknown, expected '--no-report' = the nearest flag"},
        {{"--bogus"}, "'--bogus' is unknown, expected a flag = one that --help lists"},
        {{"digits"}, "'digits' is unknown, expected a flag = one that --help lists"},
        {{"-h"}, "'-h' is unknown, expected a flag = one that --help lists"},
        {{""}, "'' is unknown, expected a flag = one that --help lists"},
        {{"a\nb"}, "'a\\x0ab' is unknown, expected a flag = one that --help lists"},
        {{"--seeds"}, "'--seeds' has no value, expected 1..16 = seeds per method"},
        {{"--device", "tpu"},
         "'--device' is 'tpu', expected cpu or gpu = where the networks train"},
        {{"--device"}, "'--device' has no value, expected cpu or gpu = where the networks train"},
        {{"--report", "--quiet"},
         "'--report' has no value, expected a file name = where the HTML "
         "report goes"},
        {{"--report="}, "'--report' is '', expected a file name = where the HTML report goes"},
        {{"--seeds", "0"}, "'--seeds' is '0', expected 1..16 = seeds per method"},
        {{"--seeds", "17"}, "'--seeds' is '17', expected 1..16 = seeds per method"},
        {{"--seeds", "2x"}, "'--seeds' is '2x', expected 1..16 = seeds per method"},
        {{"--seeds", "2.5"}, "'--seeds' is '2.5', expected 1..16 = seeds per method"},
        {{"--seeds", ""}, "'--seeds' is '', expected 1..16 = seeds per method"},
        {{"--seeds", "99999999999"},
         "'--seeds' is '99999999999', expected 1..16 = seeds per method"},
        {{"--seed", "-1"}, "'--seed' is '-1', expected 0..4294967295 = first seed"},
        {{"--learning-rate", "nan"},
         "'--learning-rate' is 'nan', expected 1e-06..1 = peak of the schedule"},
        {{"--learning-rate", "2"},
         "'--learning-rate' is '2', expected 1e-06..1 = peak of the schedule"},
        {{"--methods"},
         "'--methods' has no value, expected a list = methods to run: keys with commas between"},
        {{"--methods", ""},
         "'--methods' is '', expected a list = methods to run: keys with commas between"},
        {{"--methods", "lora,dynmole"},
         "'--methods' has 'dynmole', expected 'dyn_mole' = the nearest key"},
        {{"--methods", "mixture"},
         "'--methods' has 'mixture', expected a key = one that --help lists"},
        {{"--methods", "lora,"}, "'--methods' has '', expected a key = one that --help lists"},
        {{"--methods", ",lora"}, "'--methods' has '', expected a key = one that --help lists"},
        {{"--methods", "lora, soft"}, "'--methods' has ' soft', expected 'soft' = the nearest key"},
        {{"--methods", "a\nbcdef"},
         "'--methods' has 'a\\x0abcdef', expected a key = one that --help lists"},
        {{"--methods", "soft,lora,soft"},
         "'--methods' has 'soft' twice, expected once = each method runs once"},
        {{"--quiet=yes"}, "'--quiet' has the value 'yes', expected none = a switch"},
        {{"--quiet", "--quiet"}, "'--quiet' is given twice, expected once = one value"},
        {{"--report", "r", "--no-report"},
         "'--report' is given with '--no-report', expected one = a choice"},
        {{"--no-log", "--log", "l"}, "'--log' is given with '--no-log', expected one = a choice"},
        {{"--report", "x", "--log", "./x"},
         "'--report' is 'x', expected another file = not that of --log"},
        {{"--log", "digits.csv"},
         "'--log' is 'digits.csv', expected another file = not that of "
         "--data"},
    };
    for (const auto& c : cases) {
      CHECK(thrown([&] { parsed(c.arguments); }) ==
            std::string("value_error: talpa::examples::parse_options: ") + c.text);
    }
  }

  TEST_CASE("a report does not go over the data behind another name") {
    const scratch_folder folder;
    const std::string data = folder.write("d.csv", "x");
    fs::create_symlink(data, folder / "link");
    fs::create_hard_link(data, folder / "hard");
    for (const char* name : {"link", "hard"}) {
      CHECK(thrown([&] {
              parsed({"--data", data, "--report", folder / name});
            }).find("expected another file = not that of --data") != std::string::npos);
    }
  }

  TEST_CASE("--help names every flag and fits 90 columns") {
    options defaults;
    defaults.data = "digits.csv";
    defaults.methods = {"lora", "soft", "mola", "top_p", "mor", "x", "gw_moe", "dyn_mole"};
    const std::string text = help_text(defaults);
    for (const auto& f : detail::flags)
      CHECK(text.find(std::string("  ") + f.name) != std::string::npos);
    CHECK(text.find("[lora,soft,mola,top_p,mor,x,gw_moe,dyn_mole]") != std::string::npos);
    std::size_t begin = 0;
    for (std::size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
      CHECK(end - begin <= 90);
    }
    CHECK(begin == text.size());
  }
}

TEST_SUITE("examples/quickstart/progress") {
  using kind = progress_style::kind;
  using namespace std::chrono_literals;

  /// What a run of a minute, updated every half second, writes.
  std::string shown(progress_style style) {
    std::FILE* file = std::tmpfile();
    REQUIRE(file != nullptr);
    {
      const auto start = progress::clock::now();
      progress p(file, style, start);
      for (int i = 0; i <= 12; ++i) p.update(i / 12.0, "LoRA", start + i * 500ms);
      p.note("a note");
      p.update(1.0, "LoRA", start + 60s);
      p.finish("done", start + 61s);
    }
    std::string text(static_cast<std::size_t>(std::ftell(file)), '\0');
    std::rewind(file);
    REQUIRE(std::fread(text.data(), 1, text.size(), file) == text.size());
    std::fclose(file);
    return text;
  }

  TEST_CASE("quiet progress writes nothing") { CHECK(shown({kind::none, false}).empty()); }

  TEST_CASE("outside a terminal a plain line comes every three seconds") {
    CHECK(shown({kind::lines, false}) ==
          " 50 %  LoRA  (3.0 s left)\n"
          "100 %  LoRA  (6.0 s)\n"
          "a note\n"
          "100 %  LoRA  (1 min 00 s)\n"
          "done in 1 min 01 s\n");
  }

  TEST_CASE("on a terminal one line redraws and is gone at the end") {
    const std::string text = shown({kind::redraw, true});
    CHECK(text.find("\x1b[36m=====\x1b[0m\x1b[2m-----\x1b[0m") != std::string::npos);
    CHECK(std::count(text.begin(), text.end(), '\r') == 13 + 1 + 1 + 1);
    CHECK(text.find("\r\x1b[Ka note\n") != std::string::npos);
    CHECK(text.substr(text.rfind('\r')) == "\r\x1b[Kdone in 1 min 01 s\n");
    // The file has no width, so 80 columns are assumed and the last one stays empty.
    const std::string plain = shown({kind::redraw, false});
    const std::size_t begin = plain.find('\r') + 1;
    CHECK(plain.find("\x1b[K", begin) - begin <= 79);
  }

  TEST_CASE("without colours a terminal gets no colour codes") {
    const std::string text = shown({kind::redraw, false});
    CHECK(text.find("\x1b[") != std::string::npos);
    for (std::size_t at = 0; (at = text.find("\x1b[", at)) != std::string::npos; at += 2) {
      CHECK(text[at + 2] == 'K');
    }
  }

  TEST_CASE("NO_COLOR counts when it is not empty") {
    const char* before = std::getenv("NO_COLOR");
    const std::string saved = before != nullptr ? before : "";
    ::setenv("NO_COLOR", "1", 1);
    CHECK_FALSE(colors_wanted());
    ::setenv("NO_COLOR", "", 1);
    CHECK(colors_wanted());
    ::unsetenv("NO_COLOR");
    CHECK(colors_wanted());
    if (before != nullptr) ::setenv("NO_COLOR", saved.c_str(), 1);
  }

  TEST_CASE("a file is no terminal") {
    std::FILE* file = std::tmpfile();
    REQUIRE(file != nullptr);
    CHECK(detect_progress_style(file, false).shown == kind::lines);
    CHECK_FALSE(detect_progress_style(file, false).color);
    CHECK(detect_progress_style(file, true).shown == kind::none);
    std::fclose(file);
  }
}

TEST_SUITE("examples/quickstart/files") {
  TEST_CASE("atomic_file appears when it is committed and not before") {
    const scratch_folder folder;
    {
      atomic_file file(folder / "a");
      file.write("new");
      file.flush();
      CHECK(folder.names().count("a") == 0);
      file.commit();
      CHECK(folder.names() == std::set<std::string>{"a"});
      CHECK(thrown([&] { file.write("more"); }).find("is closed") != std::string::npos);
    }
    CHECK(read(folder / "a") == "new");
  }

  TEST_CASE("atomic_file leaves nothing and spoils nothing without commit") {
    const scratch_folder folder;
    folder.write("a", "old");
    try {
      atomic_file file(folder / "a");
      file.write("half");
      throw 1;
    } catch (int) {
    }
    CHECK(read(folder / "a") == "old");
    CHECK(folder.names() == std::set<std::string>{"a"});
  }

  TEST_CASE("two atomic_files of one name do not meet") {
    const scratch_folder folder;
    atomic_file first(folder / "a");
    atomic_file second(folder / "a");
    first.write("first");
    second.write("second");
    second.commit();
    first.commit();
    CHECK(read(folder / "a") == "first");
    CHECK(folder.names() == std::set<std::string>{"a"});
  }

  TEST_CASE("atomic_file follows a link and keeps it") {
    const scratch_folder folder;
    folder.write("target", "old");
    fs::create_symlink("target", folder / "link");
    atomic_file file(folder / "link");
    file.write("new");
    file.commit();
    CHECK(fs::is_symlink(folder / "link"));
    CHECK(read(folder / "target") == "new");
    CHECK(folder.names() == std::set<std::string>{"link", "target"});
  }

  TEST_CASE("atomic_file refuses at once what it could not replace") {
    const scratch_folder folder;
    const auto refusal = [](const std::string& path) {
      return thrown([&] { atomic_file file(path); });
    };
    const auto text = [](const std::string& path, const char* rest) {
      return "io_error: talpa::examples::atomic_file: '" + path + "' " + rest;
    };
    const std::string missing = folder / "no/such/report.html";
    CHECK(refusal(missing) ==
          text(missing,
               "is unwritable (No such file or directory), expected a file name "
               "= in a folder that can be written"));
    const std::string below_file = folder.write("file", "x") + "/report.html";
    CHECK(refusal(below_file) ==
          text(below_file,
               "is unwritable (Not a directory), expected a file name = in a "
               "folder that can be written"));
    fs::create_directory(folder / "folder");
    CHECK(refusal(folder / "folder") ==
          text(folder / "folder", "is a folder, expected a file name = where to write"));
    CHECK(refusal("/dev/null") ==
          text("/dev/null",
               "is a device, a pipe or a socket, expected a regular file = it is "
               "replaced as a whole"));
    CHECK(folder.names() == std::set<std::string>{"file", "folder"});
  }

  TEST_CASE("a full disk is an error and leaves nothing") {
    const scratch_folder folder;
    folder.write("a", "old");
    const auto old_action = std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    rlimit small = before;
    small.rlim_cur = 1 << 16;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    const std::string what = thrown([&] {
      atomic_file file(folder / "a");
      file.write(std::string(1 << 20, 'x'));
      file.commit();
    });
    ::setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, old_action);
    CHECK(what ==
          "io_error: talpa::examples::atomic_file: '" + (folder / "a") +
              "' is unwritable (File too large), expected a file name = in a folder that can "
              "be written");
    CHECK(read(folder / "a") == "old");
    CHECK(folder.names() == std::set<std::string>{"a"});
  }

  TEST_CASE("a signal that ends the program takes the temporary files along") {
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
      const scratch_folder folder;
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        // doctest has handlers of its own.
        std::signal(number, SIG_DFL);
        tidy_up_on_signals();
        atomic_file first(folder / "a");
        atomic_file second(folder / "b");
        first.write("half");
        ::raise(number);
        ::_exit(0);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      CHECK(WIFSIGNALED(status));
      CHECK(WTERMSIG(status) == number);
      CHECK(folder.names().empty());
    }
  }

  TEST_CASE("run_log writes a header and one object a line") {
    const scratch_folder folder;
    run_info info;
    info.version = version_text();
    info.compiler = "c \"quoted\"";
    info.threads = 2;
    info.device = "a device";
    info.seeds = {1, 2};
    info.command = "--report caf\xe9";  // Latin-1: not UTF-8
    {
      run_log log(folder / "l", info);
      log.write({{"event", "epoch"}, {"loss", std::nan("")}, {"epoch", 3}});
      log.commit();
    }
    std::ifstream file(folder / "l");
    std::string line;
    REQUIRE(std::getline(file, line));
    const auto header = nlohmann::json::parse(line);
    CHECK(header["event"] == "run");
    CHECK(header["talpa"] == version_text());
    CHECK(header["compiler"] == "c \"quoted\"");
    CHECK(header["threads"] == 2);
    CHECK(header["device"] == "a device");
    CHECK(header["seeds"] == std::vector<int>{1, 2});
    for (const char* member : {"build_type", "flags", "isa", "optimised", "arguments", "started"}) {
      CHECK(header.contains(member));
    }
    REQUIRE(std::getline(file, line));
    CHECK(line == R"({"event":"epoch","loss":null,"epoch":3})");
    CHECK_FALSE(std::getline(file, line));
  }

  TEST_CASE("run_log leaves nothing without commit and writes nothing without a path") {
    const scratch_folder folder;
    { run_log log(folder / "l", {}); }
    CHECK(folder.names().empty());
    run_log none("", {});
    none.write({{"event", "x"}});
    none.commit();
    CHECK(folder.names().empty());
  }

  TEST_CASE("the run's facts are never empty") {
    CHECK(version_text() == std::to_string(TALPA_VERSION_MAJOR) + "." +
                                std::to_string(TALPA_VERSION_MINOR) + "." +
                                std::to_string(TALPA_VERSION_PATCH));
    CHECK_FALSE(compiler_text().empty());
    CHECK_FALSE(isa_text().empty());
    CHECK(utc_now().size() == std::string("2026-11-22T12:58:03Z").size());
  }

  TEST_CASE("a build that is not optimised is warned of in one line") {
    run_info info;
    CHECK(build_warning(info) ==
          "warning: this is not an optimised build, seconds mean nothing; configure with "
          "-DCMAKE_BUILD_TYPE=Release\n");
    info.optimised = true;
    CHECK(build_warning(info).empty());
  }
}

namespace {

/// Numbers of no meaning in every place of a report; `seeds` runs a method.
report_data made_report(int seeds) {
  report_data data;
  data.info.version = "0.1.0";
  data.info.compiler = "<compiler> & \"co\"";
  data.info.build_type = "Release";
  data.info.flags = "-O3";
  data.info.isa = "test";
  data.info.optimised = true;
  for (int s = 1; s <= seeds; ++s) data.info.seeds.push_back(static_cast<std::uint64_t>(s));
  data.info.command = "--report '<script>alert(1)</script>'";
  data.train_images = 1198;
  data.held_out_images = 599;
  data.network = "72 - 64 - 64 - 10";
  std::uint64_t drawn = 0;
  const auto add = [&](const char* name, method_family family, index rank, bool routers) {
    method_result m;
    m.name = name;
    m.label = family == method_family::dynamic ? name : format("r = %td", rank);
    m.family = family;
    m.rank = rank;
    const bool trained = family != method_family::frozen;
    m.adapter_parameters = trained ? 1000 * rank : 0;
    m.router_parameters = routers ? 1600 : 0;
    m.active_rank = static_cast<double>(routers ? 2 * rank : rank);
    for (int s = 0; s < seeds; ++s) {
      method_run run;
      run.seed = data.info.seeds[static_cast<std::size_t>(s)];
      for (double& a : run.held_out.accuracy) a = 0.5 + 0.4 * uniform<double>({3, 0}, drawn++);
      for (int e = 0; e < 5 && trained; ++e) {
        run.train_loss.push_back(2.0 / (e + 1));
        run.held_out_loss.push_back(2.5 / (e + 1));
      }
      for (int l = 0; l < 2 && routers; ++l) {
        layer_routing layer;
        layer.layer = "layer " + std::to_string(l);
        layer.experts = 8;
        layer.entropy = {0.9, 0.8, 0.7, 0.6, 0.5, 0.4};
        for (index t = 0; t < task_count; ++t) {
          for (index e = 0; e < 8; ++e) layer.load.push_back(e == 7 ? 0.0 : 1.0 / 7);
        }
        run.layers.push_back(layer);
      }
      m.runs.push_back(run);
    }
    data.methods.push_back(m);
  };
  add("frozen base", method_family::frozen, 0, false);
  add("LoRA r = 2", method_family::lora, 2, false);
  add("LoRA r = 16", method_family::lora, 16, false);
  add("soft MoLE r = 1", method_family::soft_mole, 1, true);
  add("MoLA top-2 r = 1", method_family::mola, 1, true);
  add("top-p", method_family::dynamic, 2, true);
  add("MoR", method_family::dynamic, 2, true);
  data.settings = {"top-p: p < 0.4."};
  return data;
}

/// Empty when every tag of the page is closed in order, every attribute is quoted, and the text has
/// neither a bare & nor a bare <; otherwise the first fault. The style element is skipped.
std::string first_fault(std::string_view page) {
  std::vector<std::string> open;
  std::set<std::string> entities = {"amp", "lt", "gt", "quot", "#39"};
  const auto check_text = [&](std::string_view text) -> std::string {
    for (std::size_t at = 0; (at = text.find('&', at)) != std::string_view::npos; ++at) {
      const std::size_t end = text.find(';', at);
      if (end == std::string_view::npos ||
          entities.count(std::string(text.substr(at + 1, end - at - 1))) == 0) {
        return "bare & in: " + std::string(text.substr(at, 20));
      }
    }
    return text.find('>') == std::string_view::npos ? "" : "bare > in: " + std::string(text);
  };
  const std::string_view doctype = "<!DOCTYPE html>";
  if (page.substr(0, doctype.size()) != doctype) return "no doctype";
  page.remove_prefix(doctype.size());
  while (!page.empty()) {
    const std::size_t tag = page.find('<');
    const bool style = !open.empty() && open.back() == "style";
    if (const std::string fault = style ? "" : check_text(page.substr(0, tag)); !fault.empty()) {
      return fault;
    }
    if (tag == std::string_view::npos) break;
    page.remove_prefix(tag + 1);
    const bool closing = !page.empty() && page.front() == '/';
    if (closing) page.remove_prefix(1);
    const std::size_t name_end = page.find_first_of(" />");
    if (name_end == 0 || name_end == std::string_view::npos) return "a bare <";
    const std::string name(page.substr(0, name_end));
    page.remove_prefix(name_end);
    while (!page.empty() && page.front() == ' ') {
      page.remove_prefix(1);
      const std::size_t equals = page.find("=\"");
      const std::size_t end =
          equals == std::string_view::npos ? equals : page.find('"', equals + 2);
      if (end == std::string_view::npos) return "an attribute without quotes in " + name;
      const std::string_view key = page.substr(0, equals);
      if (key.find_first_not_of(
              "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-0123456789") !=
          std::string_view::npos) {
        return "an odd attribute in " + name + ": " + std::string(key);
      }
      const std::string_view value = page.substr(equals + 2, end - equals - 2);
      if (value.find('<') != std::string_view::npos) return "a bare < in an attribute of " + name;
      if (const std::string fault = check_text(value); !fault.empty()) return fault;
      page.remove_prefix(end + 1);
    }
    const bool empty = !page.empty() && page.front() == '/';
    if (empty) page.remove_prefix(1);
    if (page.empty() || page.front() != '>') return "an unfinished tag " + name;
    page.remove_prefix(1);
    if (closing) {
      if (open.empty() || open.back() != name) return "unexpected </" + name + ">";
      open.pop_back();
    } else if (!empty) {
      open.push_back(name);
    }
  }
  return open.empty() ? "" : "<" + open.back() + "> stays open";
}

std::size_t count_of(std::string_view text, std::string_view part) {
  std::size_t count = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string_view::npos; ++at) ++count;
  return count;
}

}  // namespace

TEST_SUITE("examples/quickstart/report") {
  TEST_CASE("the checker of these tests finds faults") {
    CHECK(first_fault("<!DOCTYPE html><p class=\"a\">x<br/></p>").empty());
    CHECK_FALSE(first_fault("<!DOCTYPE html><p>x").empty());
    CHECK_FALSE(first_fault("<!DOCTYPE html><p><b>x</p></b>").empty());
    CHECK_FALSE(first_fault("<!DOCTYPE html><p>a & b</p>").empty());
    CHECK_FALSE(first_fault("<!DOCTYPE html><p>a < b</p>").empty());
    CHECK_FALSE(first_fault("<!DOCTYPE html><p class=a>b</p>").empty());
  }

  TEST_CASE("the report is well formed for any number of seeds, and without data") {
    for (const int seeds : {1, 2, 3}) {
      report_data data = made_report(seeds);
      CHECK(first_fault(report_html(data)) == "");
      data.quick = true;
      data.info.optimised = false;
      CHECK(first_fault(report_html(data)) == "");
    }
    CHECK(first_fault(report_html({})) == "");
    CHECK(first_fault(report_html(made_report(0))) == "");
  }

  TEST_CASE("the report escapes what comes from outside") {
    report_data data = made_report(2);
    data.methods[1].name = "a<b>&\"'\xff\x01\xe2\x82\xac";
    const std::string page = report_html(data);
    CHECK(first_fault(page) == "");
    CHECK(page.find("<script") == std::string::npos);
    CHECK(page.find("&lt;script&gt;alert(1)&lt;/script&gt;") != std::string::npos);
    CHECK(page.find("&lt;compiler&gt; &amp; &quot;co&quot;") != std::string::npos);
    CHECK(page.find("a&lt;b&gt;&amp;&quot;&#39;\\xff\\x01\xe2\x82\xac") != std::string::npos);
  }

  TEST_CASE("escape_html knows what is UTF-8") {
    CHECK(escape_html("\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") ==
          "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    CHECK(escape_html("\xc0\x80") == "\\xc0\\x80");           // overlong
    CHECK(escape_html("\xe0\x80\x80") == "\\xe0\\x80\\x80");  // overlong
    CHECK(escape_html("\xed\xa0\x80") == "\\xed\\xa0\\x80");  // surrogate
    CHECK(escape_html("\xf4\x90\x80\x80") == "\\xf4\\x90\\x80\\x80");
    CHECK(escape_html("\xe2\x82") == "\\xe2\\x82");  // cut short
  }

  TEST_CASE("the report loads nothing") {
    const std::string page = report_html(made_report(2));
    for (const char* part : {"http://", "https://", "src=", "href=", "url(", "@import", "<script",
                             "<link", "<iframe", "<img", "<object"}) {
      CHECK(page.find(part) == std::string::npos);
    }
    CHECK(page.find("default-src 'none'") != std::string::npos);
    CHECK(page.find("prefers-color-scheme:dark") != std::string::npos);
  }

  TEST_CASE("the report shows every figure, and its numbers in tables too") {
    const report_data data = made_report(2);
    const std::string page = report_html(data);
    CHECK(count_of(page, "<svg ") == 4);
    CHECK(count_of(page, "<figcaption>") == 4);
    CHECK(count_of(page, "role=\"img\"") == 4);
    CHECK(count_of(page, "<desc>") == 4);
    for (const char* axis : {"active rank per token (log scale)", "trainable parameters",
                             "mean accuracy (%)", "worst-task accuracy (%)", "training loss (nats)",
                             "held-out loss (nats)", "entropy / ln E", "epoch", "expert"}) {
      CHECK(page.find(axis) != std::string::npos);
    }
    // Two panels in two rows for six adapted methods, and four families in the legend.
    CHECK(count_of(page, "class=\"mark ") == 4 * 6 + 4);
    // Four methods, two layers, eight instructions, eight experts; and the colour bar.
    CHECK(count_of(page, "class=\"heat\"") == 4 * 2 * 8 * 8 + 24);
    CHECK(count_of(page, ">1 dead<") == 8);
    CHECK(page.find("<li>top-p: p &lt; 0.4.</li>") != std::string::npos);
    CHECK(page.find("1, 1 of 8") != std::string::npos);
    for (const method_result& m : data.methods) {
      CHECK(page.find(percent(m.mean_accuracy().mean)) != std::string::npos);
      CHECK(page.find(percent(m.worst_accuracy().mean)) != std::string::npos);
    }
    CHECK(page.find("<td>0.4000</td>") != std::string::npos);  // the last training loss
    CHECK(page.find("<td>0.5000</td>") != std::string::npos);  // the last held-out loss
    CHECK(page.find("Short run") == std::string::npos);
    CHECK(page.find("Not an optimised build") == std::string::npos);
  }

  TEST_CASE("the report says of a build that is not optimised that its seconds mean nothing") {
    report_data data = made_report(1);
    data.info.optimised = false;
    CHECK(count_of(report_html(data),
                   "<p class=\"warning\">Not an optimised build: seconds mean nothing.</p>") == 1);
  }

  TEST_CASE("the report compares methods of equal cost") {
    report_data data = made_report(1);
    const auto give = [&](std::size_t method, index adapters, double rank, double accuracy) {
      data.methods[method].adapter_parameters = adapters;
      data.methods[method].active_rank = rank;
      data.methods[method].runs[0].held_out.accuracy.fill(accuracy);
    };
    give(1, 1000, 2.0, 0.5);
    give(2, 8000, 16.0, 0.9);
    give(3, 8000, 2.0, 0.7);
    give(4, 8000, 4.0, 0.8);
    give(5, 4000, 7.0, 0.6);
    give(6, 5000, 8.0, 0.4);
    const std::string page = report_html(data);
    CHECK(
        page.find(
            "At active rank 2.0: soft MoLE r = 1 has 70.0\u00a0%, LoRA r = 2 has 50.0\u00a0%. ") !=
        std::string::npos);
    CHECK(page.find(
              "At 8,000 adapter parameters, routers not counted: LoRA r = 16 has 90.0\u00a0%, MoLA "
              "top-2 r = 1 has 80.0\u00a0%, soft MoLE r = 1 has 70.0\u00a0%. ") !=
          std::string::npos);
    // Ranks of one method alone are no comparison, other routers are several methods.
    give(2, 1000, 16.0, 0.9);
    give(3, 2000, 5.0, 0.9);
    give(4, 3000, 6.0, 0.9);
    CHECK(report_html(data).find(">At ") == std::string::npos);
    give(6, 5000, 7.0, 0.4);
    CHECK(report_html(data).find(
              "At active rank 7.0: top-p has 60.0\u00a0%, MoR has 40.0\u00a0%. </p>") !=
          std::string::npos);
  }

  TEST_CASE("labels of methods that coincide do not") {
    report_data data = made_report(1);
    for (std::size_t m = 1; m < data.methods.size(); ++m) {
      data.methods[m].adapter_parameters = 4000;
      data.methods[m].router_parameters = 0;
      data.methods[m].active_rank = 4.0;
      data.methods[m].runs[0].held_out.accuracy.fill(0.8);
    }
    const std::string figure = accuracy_figure(data);
    std::set<std::string> places;
    for (std::size_t at = 0; (at = figure.find("<text ", at)) != std::string::npos; ++at) {
      const std::string tag = figure.substr(at, figure.find('>', at) - at);
      if (tag.find("note halo") != std::string::npos)
        places.insert(tag.substr(0, tag.find("class")));
    }
    CHECK(places.size() == 4 * 6);  // six methods in four panels
  }

  TEST_CASE("figures name other routers, connect only ranks of one method, and show none alone") {
    report_data data = made_report(1);
    const std::string losses = loss_figure(data);
    // Each at the end of its two lines.
    CHECK(count_of(losses, ">top-p</text>") == 2);
    CHECK(count_of(losses, ">MoR</text>") == 2);
    CHECK(count_of(losses, ">other routers</text>") == 1);
    CHECK(count_of(losses, ">r = 16</text>") == 2);
    // The two ranks of LoRA, in four panels.
    CHECK(count_of(accuracy_figure(data), "series thin lora") == 4);
    CHECK(count_of(accuracy_figure(data), "series thin other") == 0);
    data.methods.resize(5);
    CHECK(report_html(data).find("other routers") == std::string::npos);
    data.methods.resize(1);  // the frozen base
    CHECK(first_fault(report_html(data)) == "");
  }

  TEST_CASE("many methods with routers take several rows of panels") {
    std::vector<method_result> made(9);
    std::vector<const method_result*> methods;
    for (std::size_t i = 0; i < made.size(); ++i) {
      made[i].family = i < 4 ? method_family::mola : method_family::dynamic;
      methods.push_back(&made[i]);
    }
    const auto lengths = [&](std::size_t first, std::size_t last) {
      std::vector<std::size_t> result;
      const std::vector<const method_result*> some(methods.begin() + static_cast<index>(first),
                                                   methods.begin() + static_cast<index>(last));
      for (const auto& row : detail::in_rows(some)) result.push_back(row.size());
      return result;
    };
    using sizes = std::vector<std::size_t>;
    CHECK(lengths(0, 0) == sizes{});
    CHECK(lengths(0, 9) == sizes{4, 5});
    CHECK(lengths(2, 6) == sizes{4});  // short enough for one row
    CHECK(lengths(3, 9) == sizes{1, 5});
    CHECK(detail::place_of(detail::in_rows(methods), 3) ==
          std::pair<std::size_t, std::size_t>{0, 3});
    CHECK(detail::place_of(detail::in_rows(methods), 4) ==
          std::pair<std::size_t, std::size_t>{1, 0});

    // All panels are inside the drawing, and no two at one place.
    report_data data = made_report(1);
    while (data.methods.size() < 10) data.methods.push_back(data.methods.back());
    for (const std::string& figure : {load_figure(data), entropy_figure(data)}) {
      double width = 0, height = 0;
      REQUIRE(std::sscanf(figure.c_str(), "<svg viewBox=\"0 0 %lf %lf\"", &width, &height) == 2);
      std::set<std::pair<double, double>> headings;
      double lowest = 0;
      for (std::size_t at = 0; (at = figure.find("<text ", at)) != std::string::npos; ++at) {
        double x = 0, y = 0;
        REQUIRE(std::sscanf(figure.c_str() + at, "<text x=\"%lf\" y=\"%lf\"", &x, &y) == 2);
        CHECK((x >= 0 && x <= width && y >= 0 && y <= height));
        lowest = std::max(lowest, y);
        const std::size_t end = figure.find('>', at);
        if (figure.substr(at, end - at).find("heading") != std::string::npos)
          headings.insert({x, y});
      }
      CHECK(headings.size() == 7);
      CHECK(height - lowest < 30);
    }
  }

  TEST_CASE("numbers that are not finite are shown as such and drawn nowhere") {
    report_data data = made_report(1);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    data.methods[1].runs[0].held_out.accuracy.fill(nan);
    data.methods[2].runs[0].train_loss.assign(5, std::numeric_limits<double>::infinity());
    data.methods[3].runs[0].layers[0].load.assign(64, nan);
    data.methods[3].runs[0].layers[0].entropy.assign(6, nan);
    const std::string page = report_html(data);
    CHECK(first_fault(page) == "");
    CHECK(page.find("\"nan") == std::string::npos);
    CHECK(page.find(",nan") == std::string::npos);
    CHECK(page.find("\"inf") == std::string::npos);
    CHECK(page.find("=\"n/a\"") == std::string::npos);
    CHECK(page.find("n/a,") == std::string::npos);
    CHECK(page.find("<td>n/a</td>") != std::string::npos);
  }

  TEST_CASE("the terminal table is aligned and counts the router apart") {
    const report_data data = made_report(2);
    const std::string table = result_table(data, false);
    std::vector<std::string> lines;
    for (std::size_t begin = 0, end; (end = table.find('\n', begin)) != std::string::npos;
         begin = end + 1) {
      lines.push_back(table.substr(begin, end - begin));
    }
    REQUIRE(lines.size() == 2 + data.methods.size());
    // Seconds end every line, at the same column.
    for (const std::string& line : lines) CHECK(line.size() == lines[1].size());
    const std::size_t router = lines[0].find("router") + 6;
    CHECK(lines[5].substr(router - 5, 5) == "1,600");
    CHECK(lines[3].substr(router - 5, 5) == "    -");
    CHECK(table.find('\x1b') == std::string::npos);
    CHECK(result_table(data, true).find("\x1b[1mmethod") == 0);
    for (const char c : table) CHECK((c == '\n' || (c >= ' ' && c <= '~')));
  }

  TEST_CASE("results over seeds are means and extremes") {
    method_result m;
    m.runs.resize(2);
    m.runs[0].held_out.accuracy = {0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9};
    m.runs[1].held_out.accuracy = {0.9, 0.9, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9};
    m.runs[0].train_loss = {2.0, 1.0};
    m.runs[1].train_loss = {1.0, 0.5, 0.25};
    m.runs[1].held_out_loss = {7.0};
    CHECK(m.worst_accuracy().mean == doctest::Approx(0.55));
    CHECK(m.worst_accuracy().low == 0.5);
    CHECK(m.worst_accuracy().high == 0.6);
    CHECK(m.accuracy(1).mean == doctest::Approx(0.7));
    CHECK(m.worst_task() == 1);
    CHECK(m.mean_curve(&method_run::train_loss) == std::vector<double>{1.5, 0.75});
    CHECK(m.mean_curve(&method_run::held_out_loss).empty());
    CHECK(std::isnan(method_result{}.mean_accuracy().mean));
  }

  TEST_CASE("axes have round ticks inside their range") {
    const scale accuracy = linear_scale(0.713, 0.968, 5, 100, 0, 1);
    REQUIRE(accuracy.ticks.size() == 7);
    CHECK(accuracy.ticks.front().label == "70");
    CHECK(accuracy.ticks[1].label == "75");
    CHECK(accuracy.ticks.back().label == "100");
    CHECK(accuracy.place(0.70) == doctest::Approx(0));
    CHECK(accuracy.place(1.00) == doctest::Approx(1));
    CHECK(linear_scale(0.5, 0.5, 5, 100, 0, 1).ticks.size() >= 2);
    CHECK(linear_scale(0.991, 0.994, 5, 100, 0, 1).ticks[1].label == "99.15");

    const scale parameters = log_scale(600, 7000);
    std::vector<std::string> labels;
    for (const tick& t : parameters.ticks) labels.push_back(t.label);
    CHECK(labels == std::vector<std::string>{"1,000", "2,000", "5,000"});
    CHECK(parameters.place(600) == doctest::Approx(0));
    CHECK(parameters.place(std::sqrt(600.0 * 7000.0)) == doctest::Approx(0.5));
    CHECK_FALSE(parameters.accepts(0));
    CHECK(log_scale(0.04, 0.3).ticks.front().label == "0.05");
  }

  TEST_CASE("spread_apart keeps order, distance and bounds") {
    const std::vector<double> placed = spread_apart({50, 50, 10, 52}, 14, 0, 100);
    CHECK(placed[2] == 10);
    CHECK(placed[1] - placed[0] >= 14);
    CHECK(placed[3] - placed[1] >= 14);
    for (const double p : spread_apart({99, 99, 99}, 14, 0, 100)) CHECK((p >= 0 && p <= 100));
    CHECK(spread_apart({}, 14, 0, 100).empty());
  }

  TEST_CASE("numbers read well") {
    CHECK(with_thousands(0) == "0");
    CHECK(with_thousands(999) == "999");
    CHECK(with_thousands(1234567) == "1,234,567");
    CHECK(with_thousands(-1234) == "-1,234");
    CHECK(fixed(-0.001, 1) == "0.0");
    CHECK(fixed(-0.06, 1) == "-0.1");
    CHECK(percent(0.9756) == "97.6");
    CHECK(duration(9.94) == "9.9 s");
    CHECK(duration(59.4) == "59 s");
    CHECK(duration(125) == "2 min 05 s");
    CHECK(coordinate(12.04) == "12");
    CHECK(coordinate(12.06) == "12.1");
  }
}

}  // namespace talpa::examples
