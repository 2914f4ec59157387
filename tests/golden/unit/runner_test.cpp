// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include "support/random.hpp"

#include <talpa/core/error.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace talpa::golden {

namespace {

/// A folder of its own that goes away with the test.
class scratch_folder {
 public:
  scratch_folder() {
    static support::test_random random(
        static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(this)));
    do {
      path_ = std::filesystem::temp_directory_path() /
              ("talpa_golden_" + std::to_string(random.bits()));
    } while (!std::filesystem::create_directories(path_));
  }
  scratch_folder(const scratch_folder&) = delete;
  scratch_folder& operator=(const scratch_folder&) = delete;
  ~scratch_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string path() const { return path_.string(); }
  std::filesystem::path write(const std::string& name, const std::string& text) const {
    const std::filesystem::path file = path_ / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return file;
  }

 private:
  std::filesystem::path path_;
};

struct printed {
  int status = 0;
  std::string out, err;
};
printed run_with(const std::vector<std::string>& arguments) {
  std::FILE* const out = std::tmpfile();
  std::FILE* const err = std::tmpfile();
  REQUIRE(out != nullptr);
  REQUIRE(err != nullptr);
  printed p;
  p.status = run(arguments, out, err);
  for (auto [file, text] : {std::pair{out, &p.out}, std::pair{err, &p.err}}) {
    std::rewind(file);
    std::array<char, 4096> buffer;
    std::size_t read = 0;
    while ((read = std::fread(buffer.data(), 1, buffer.size(), file)) > 0) {
      text->append(buffer.data(), read);
    }
    std::fclose(file);
  }
  return p;
}

bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// y = factor x, as a method would compute it; what else it does, the case says.
void twice(const golden_case& c, checker& check) {
  matrix<double, cpu> y = c.at("inputs.x").rows();
  for (index i = 0; i < y.size(); ++i) y.data()[i] *= c.number("hparams.factor");
  check.equal("outputs.y", y, c.forward());
  if (c.has("outputs.scale")) check.equal("outputs.scale", c.number("hparams.factor"), {});
  if (c.has("outputs.extra") && c.flag("extra_is_missing")) {
    check.leave("outputs.extra", "no extra here");
  }
  if (c.has("outputs.part.one")) check.equal("outputs.part.one", c.number("hparams.factor"), {});
  if (c.has("outputs.set")) {
    const bool fine = c.at("outputs.set", {2}).data[0] == 1.0;
    check.account("outputs.set", fine ? "" : "another set");
  }
  if (c.flag("throws")) throw shape_error("a shape is wrong");
}
const registration sample("routers/sample", twice);
const registration sample_of_perft("perft/sample", [](const golden_case& c, checker& check) {
  for (index l = 0; l < c.length("inputs.layers"); ++l) {
    const tensor layer = c.at("inputs.layers." + std::to_string(l));
    check.equal("outputs.layers." + std::to_string(l), layer.rows(), c.forward());
  }
  check.equal("loss", 3.0, c.forward());
});

/// A file of the routers schema around the text of its cases.
std::string file_of(const std::string& cases, const std::string& more = "") {
  return R"({"method": "sample", "source": "original", "dtype": "float64", )" + more +
         R"("cases": [)" + cases + "]}";
}
std::string case_of(const std::string& id, const std::string& outputs,
                    const std::string& more = "") {
  return R"({"id": ")" + id + R"(", )" + more +
         R"("hparams": {"factor": 2}, "inputs": {"x": [[1, 2], [3, "inf"]]}, "outputs": {)" +
         outputs + "}}";
}
const std::string right = R"("y": [[2, 4], [6, "inf"]])";

/// The tally of a file with these cases.
tally of(const std::string& text, const std::string& name = "routers/sample.json") {
  const scratch_folder folder;
  return run_file(folder.write(name, text));
}

}  // namespace

TEST_SUITE("golden/runner") {
  TEST_CASE("a case passes when every expected field agrees") {
    const tally t = of(file_of(case_of("a", right) + "," + case_of("b", right + R"(, "scale": 2)"),
                               R"("count": 2, )"));
    CHECK(t.note == "");
    CHECK(t.passed == 2);
    CHECK(t.failed == 0);
    CHECK(t.skipped == 0);
  }

  TEST_CASE("a key may have a dot itself") {
    const tally t = of(file_of(case_of("a", right + R"(, "part.one": 2)")));
    CHECK(t.passed == 1);
    CHECK(of(file_of(case_of("a", right + R"(, "part": {"one": 2})"))).passed == 1);
    CHECK(of(file_of(case_of("a", right + R"(, "part.one": 3)"))).failed == 1);
  }

  TEST_CASE("the first mismatch is named with case, field, position, found and expected") {
    const tally t =
        of(file_of(case_of("a", right) + "," + case_of("b", R"("y": [[2, 4], [6.5, "inf"]])")));
    CHECK(t.passed == 1);
    CHECK(t.failed == 1);
    CHECK(t.note == "b: outputs.y[1][0] is 6, expected 6.5 within 6.5000000000000003e-09");
  }

  TEST_CASE("tolerances are those of the folder and the scalar") {
    CHECK(of(file_of(case_of("a", R"("y": [[2.000000001, 4], [6, "inf"]])"))).passed == 1);
    CHECK(of(file_of(case_of("a", R"("y": [[2.000000003, 4], [6, "inf"]])"))).failed == 1);
    const std::string perft = R"({"method": "s", "source": "original", "dtype": "TYPE", "cases": [
      {"name": "a", "inputs": {"layers": [{"shape": [1, 2], "data": [1, 2]}]},
       "outputs": {"layers": [{"shape": [1, 2], "data": [1, 2.000001]}]}, "loss": 3}]})";
    const auto with = [&](const char* dtype) {
      std::string text = perft;
      text.replace(text.find("TYPE"), 4, dtype);
      return of(text, "perft/sample.json");
    };
    CHECK(with("float32").passed == 1);
    CHECK(with("float64").failed == 1);
  }

  TEST_CASE("infinity and NaN agree with themselves only") {
    CHECK(of(file_of(case_of("a", R"("y": [[2, 4], [6, "-inf"]])"))).failed == 1);
    CHECK(of(file_of(case_of("a", R"("y": [[2, 4], [6, "nan"]])"))).failed == 1);
    CHECK(of(file_of(case_of("a", R"("y": [[2, 4], [6, 1e300]])"))).failed == 1);
    CHECK(of(file_of(case_of("a", R"("y": [["inf", 4], [6, "inf"]])"))).failed == 1);
  }

  TEST_CASE("a field that nothing was said about is a failure") {
    const tally t = of(file_of(case_of("a", right + R"(, "extra": 1)")));
    CHECK(t.failed == 1);
    CHECK(t.note == "a: outputs.extra was neither compared nor left out with a reason");
  }

  TEST_CASE("a field that is left out makes the case skipped, never passed") {
    const tally t =
        of(file_of(case_of("a", right + R"(, "extra": 1)", R"("extra_is_missing": true, )") + "," +
                   case_of("b", right + R"(, "extra": null)")));
    CHECK(t.passed == 1);
    CHECK(t.skipped == 1);
    CHECK(t.failed == 0);
    CHECK(t.note == "outputs.extra: no extra here");
  }

  TEST_CASE("a mismatch counts even where a field is left out") {
    const tally t = of(file_of(
        case_of("a", R"("y": [[2, 5], [6, "inf"]], "extra": 1)", R"("extra_is_missing": true, )")));
    CHECK(t.failed == 1);
    CHECK(t.skipped == 0);
  }

  TEST_CASE("fields can be compared by other means") {
    CHECK(of(file_of(case_of("a", right + R"(, "set": [1, 2])"))).passed == 1);
    CHECK(of(file_of(case_of("a", right + R"(, "set": [2, 1])"))).note ==
          "a: outputs.set: another set");
  }

  TEST_CASE("a method without a runner is skipped") {
    const tally t =
        of(file_of(case_of("a", right) + "," + case_of("b", right)), "routers/of_the_future.json");
    CHECK(t.passed == 0);
    CHECK(t.skipped == 2);
    CHECK(t.note == "talpa has no such method");
  }

  TEST_CASE("malformed files are failures with a clear text") {
    const std::string good = case_of("a", right);
    const std::vector<std::pair<std::string, std::string>> examples = {
        {"", "malformed file: not JSON"},
        {"{\"cases\": [", "malformed file: not JSON"},
        {"[1, 2]", "malformed file: no list 'cases'"},
        {R"({"method": "m"})", "malformed file: no list 'cases'"},
        {R"({"cases": []})", "malformed file: no list 'cases'"},
        {R"({"method": "m", "source": "s", "cases": [1]})", "malformed file: no string 'dtype'"},
        {R"({"method": 3, "source": "s", "dtype": "float64", "cases": [1]})",
         "malformed file: no string 'method'"},
        {file_of("1"), "malformed file: case 0 has no string 'id'"},
        {file_of(good + R"(, {"id": 4})"), "malformed file: case 1 has no string 'id'"},
        {file_of(R"({"id": "a", "inputs": {}, "outputs": {}})"),
         "malformed file: case 0 has no object 'hparams'"},
        {file_of(good + "," + good), "malformed file: two cases 'a'"},
        {file_of(good, R"("count": 3, )"), "malformed file: 1 cases, expected 3 = its 'count'"},
    };
    for (const auto& [file, note] : examples) {
      const std::string& text = file;  // a binding cannot be captured
      CAPTURE(text);
      const tally t = of(text);
      CHECK(t.failed == 1);
      CHECK(t.passed == 0);
      CHECK_MESSAGE(mentions(t.note, note), t.note);
    }
    // Of methods that talpa does not have as well.
    CHECK(of("{", "routers/of_the_future.json").failed == 1);
    CHECK(run_file("/nowhere/routers/sample.json").note == "malformed file: cannot be read");
  }

  TEST_CASE("malformed cases are failures that name the field") {
    const auto note_of = [](const std::string& x) {
      return of(file_of(R"({"id": "a", "hparams": {"factor": 2}, "outputs": {}, "inputs": {)" + x +
                        "}}"))
          .note;
    };
    CHECK(note_of("") == "a: malformed case: no field 'inputs.x'");
    CHECK(note_of(R"("x": null)") == "a: malformed case: 'inputs.x' is null");
    CHECK(note_of(R"("x": [[1, 2], [3]])") == "a: malformed case: 'inputs.x' is a ragged list");
    CHECK(note_of(R"("x": [[1], 2])") == "a: malformed case: 'inputs.x' is a ragged list");
    CHECK(note_of(R"("x": [1, [2]])") == "a: malformed case: 'inputs.x' is a ragged list");
    CHECK(note_of(R"("x": [1, "two"])") ==
          "a: malformed case: 'inputs.x' holds \"two\", expected a number");
    CHECK(note_of(R"("x": {"shape": [2, 2], "data": [1, 2, 3]})") ==
          "a: malformed case: 'inputs.x' has 3 numbers, expected 4 = product of its shape [2, 2]");
    CHECK(note_of(R"("x": {"shape": [-1], "data": []})") ==
          "a: malformed case: 'inputs.x' has the shape [-1]");
    CHECK(note_of(R"("x": {"shape": 3, "data": []})") ==
          "a: malformed case: 'inputs.x' has a shape or data that is no list");
    const auto factor = [](const std::string& value) {
      return of(file_of(R"({"id": "a", "hparams": {"factor": )" + value +
                        R"(}, "outputs": {}, "inputs": {"x": [1]}})"))
          .note;
    };
    CHECK(factor("[2]") == "a: malformed case: 'hparams.factor' is [2], expected a number");
    CHECK(of(file_of(case_of("a", right + R"(, "set": [1, 2, 3])"))).note ==
          "a: malformed case: 'outputs.set' has shape [3], expected [2]");
  }

  TEST_CASE("a result of another shape is a failure") {
    CHECK(of(file_of(case_of("a", R"("y": [2, 4, 6])"))).note ==
          "a: outputs.y has shape [2, 2], expected [3]");
  }

  TEST_CASE("an exception of the library fails its case only") {
    const tally t =
        of(file_of(case_of("a", right, R"("throws": true, )") + "," + case_of("b", right)));
    CHECK(t.passed == 1);
    CHECK(t.failed == 1);
    CHECK(t.note == "a: exception: a shape is wrong");
  }

  TEST_CASE("lists of tensors are compared one by one") {
    const std::string text = R"({"method": "s", "source": "original", "dtype": "float64", "cases": [
      {"name": "a", "inputs": {"layers": [{"shape": [1], "data": [1]}]},
       "outputs": {"layers": [{"shape": [1], "data": [1]}, {"shape": [1], "data": [2]}]},
       "loss": 3}]})";
    CHECK(of(text, "perft/sample.json").note ==
          "a: outputs.layers.1 was neither compared nor left out with a reason");
  }

  TEST_CASE("the program prints a line a file and closes with the sums") {
    const scratch_folder folder;
    folder.write("routers/sample.json", file_of(case_of("a", right)));
    folder.write("routers/future.json", file_of(case_of("a", right)));
    folder.write("routers/notes.txt", "not looked at");
    const printed p = run_with({"--dir", folder.path()});
    CHECK(p.status == 0);
    CHECK(p.err == "");
    CHECK(p.out ==
          "routers/future: 0 passed, 0 failed, 1 skipped (talpa has no such method)\n"
          "routers/sample: 1 passed, 0 failed, 0 skipped\n"
          "1 passed, 0 failed, 1 skipped\n");
    folder.write("perft/broken.json", "{");
    const printed broken = run_with({"--dir", folder.path()});
    CHECK(broken.status == 1);
    CHECK(mentions(broken.out,
                   "perft/broken: 0 passed, 1 failed, 0 skipped (malformed file: "
                   "not JSON: "));
    CHECK(mentions(broken.out, "\n1 passed, 1 failed, 1 skipped\n"));
    for (const char* const name : {"sample", "routers/sample"}) {
      const printed one = run_with({"--method", name, "--dir", folder.path()});
      CHECK(one.status == 0);
      CHECK(one.out ==
            "routers/sample: 1 passed, 0 failed, 0 skipped\n1 passed, 0 failed, 0 skipped\n");
    }
  }

  TEST_CASE("flags that make no sense end with status 2 and the usage") {
    const scratch_folder empty, full;
    full.write("routers/sample.json", file_of(case_of("a", right)));
    const std::vector<std::pair<std::vector<std::string>, std::string>> examples = {
        {{}, "--dir is missing"},
        {{"--dir"}, "--dir needs a value"},
        {{"--dir", ""}, "--dir needs a value"},
        {{"--method", "x"}, "--dir is missing"},
        {{"--dir", full.path(), "--dir", full.path()}, "--dir comes twice"},
        {{"--dir", full.path(), "--method"}, "--method needs a value"},
        {{"--folder", full.path()}, "unknown argument '--folder'"},
        {{full.path()}, "unknown argument '" + full.path() + "'"},
        {{"--dir", full.path() + "/no"}, "'" + full.path() + "/no' is no folder"},
        {{"--dir", empty.path()}, "has no routers/*.json and no perft/*.json"},
        {{"--dir", full.path(), "--method", "other"}, "has no file for the method 'other'"},
    };
    for (const auto& [arguments, complaint] : examples) {
      const std::string& text = complaint;  // a binding cannot be captured
      CAPTURE(text);
      const printed p = run_with(arguments);
      CHECK(p.status == 2);
      CHECK(p.out == "");
      CHECK_MESSAGE(mentions(p.err, text), p.err);
      CHECK(mentions(p.err, "Usage: talpa_golden --dir DIR"));
    }
    const printed help = run_with({"--help"});
    CHECK(help.status == 0);
    CHECK(mentions(help.out, "Usage: talpa_golden --dir DIR"));
  }

  TEST_CASE("tensors merge their leading dimensions or transpose their blocks") {
    const tensor t{{2, 1, 3}, {1, 2, 3, 4, 5, 6}};
    CHECK(t.rows().rows() == 2);
    CHECK(t.rows()(1, 2) == 6.0);
    const matrix<double, cpu> blocks = t.transposed_blocks();
    CHECK(blocks.rows() == 6);
    CHECK(blocks.cols() == 1);
    CHECK(blocks(4, 0) == 5.0);
    const tensor square{{1, 2, 2}, {1, 2, 3, 4}};
    CHECK(square.transposed_blocks()(0, 1) == 3.0);
    CHECK(square.transposed_blocks()(1, 0) == 2.0);
    CHECK(position(t, 5) == "[1][0][2]");
  }
}

}  // namespace talpa::golden
