// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include "golden/json.hpp"

#include <algorithm>
#include <exception>
#include <fstream>
#include <map>
#include <memory>
#include <utility>

namespace talpa::golden {

namespace {

using nlohmann::json;

constexpr const char* usage =
    "Usage: talpa_golden --dir DIR [--method NAME]\n"
    "\n"
    "Runs talpa on the golden vectors DIR/routers/*.json and DIR/perft/*.json and compares. Prints "
    "a\n"
    "line a file and at the end: N passed, N failed, N skipped (cases). Exit status 1 when a case\n"
    "failed, 2 when the arguments make no sense.\n"
    "\n"
    "  --dir DIR       folder with routers/ and perft/\n"
    "  --method NAME   only files of this name, with or without its folder: topk_mola,\n"
    "                  routers/topk_mola\n"
    "  --help          this text\n";

std::map<std::string, method>& methods() {
  static std::map<std::string, method> all;
  return all;
}

/// Where the two schemas differ.
struct schema {
  const char* name_key;
  std::vector<const char*> sections;
};
schema schema_of(const std::string& folder) {
  if (folder == "routers") return {"id", {"hparams", "inputs", "outputs"}};
  return {"name", {"inputs", "outputs"}};
}

std::vector<golden_case> read(const std::filesystem::path& file) {
  const std::string folder = file.parent_path().filename().string();
  const schema rules = schema_of(folder);
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw malformed("cannot be read");
  json root;
  try {
    root = json::parse(stream);
  } catch (const json::exception& e) {
    throw malformed(std::string("not JSON: ") + e.what());
  }
  if (!root.is_object() || !root.contains("cases") || !root["cases"].is_array() ||
      root["cases"].empty()) {
    throw malformed("no list 'cases'");
  }
  for (const char* const key : {"method", "source", "dtype"}) {
    if (!root.contains(key) || !root[key].is_string()) {
      throw malformed(std::string("no string '") + key + "'");
    }
  }
  if (root.contains("count") && root["count"] != root["cases"].size()) {
    throw malformed(std::to_string(root["cases"].size()) + " cases, expected " +
                    root["count"].dump() + " = its 'count'");
  }
  std::vector<golden_case> cases;
  for (std::size_t i = 0; i < root["cases"].size(); ++i) {
    json& c = root["cases"][i];
    const std::string where = "case " + std::to_string(i);
    if (!c.is_object() || !c.contains(rules.name_key) || !c[rules.name_key].is_string()) {
      throw malformed(where + " has no string '" + rules.name_key + "'");
    }
    for (const char* const section : rules.sections) {
      if (!c.contains(section) || !c[section].is_object()) {
        throw malformed(where + " has no object '" + section + "'");
      }
    }
    const std::string name = c[rules.name_key];
    const auto same = [&](const golden_case& other) { return other.name() == name; };
    if (std::any_of(cases.begin(), cases.end(), same)) {
      throw malformed("two cases '" + name + "'");
    }
    cases.emplace_back(name, folder, root["dtype"],
                       std::make_shared<golden_case::node>(golden_case::node{std::move(c)}));
  }
  return cases;
}

void add(std::string& note, const std::string& text) {
  if (text.empty() || note.find(text) != std::string::npos) return;
  note += (note.empty() ? "" : "; ") + text;
}

std::string counts(const tally& t) {
  return std::to_string(t.passed) + " passed, " + std::to_string(t.failed) + " failed, " +
         std::to_string(t.skipped) + " skipped";
}

/// FOLDER/FILE without its extension.
std::string name_of(const std::filesystem::path& file) {
  return file.parent_path().filename().string() + "/" + file.stem().string();
}

std::vector<std::filesystem::path> files_of(const std::filesystem::path& dir) {
  std::vector<std::filesystem::path> files;
  for (const char* const folder : {"routers", "perft"}) {
    if (!std::filesystem::is_directory(dir / folder)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(dir / folder)) {
      if (entry.path().extension() == ".json") files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

registration::registration(const char* name, method run) { methods()[name] = run; }

tally run_file(const std::filesystem::path& file) {
  tally t;
  std::vector<golden_case> cases;
  try {
    cases = read(file);
  } catch (const malformed& e) {
    t.failed = 1;
    t.note = std::string("malformed file: ") + e.what();
    return t;
  }
  const auto found = methods().find(name_of(file));
  if (found == methods().end()) {
    t.skipped = static_cast<index>(cases.size());
    t.note = "talpa has no such method";
    return t;
  }
  std::string failure, reasons;
  for (const golden_case& c : cases) {
    checker check(c);
    std::string problem;
    try {
      found->second(c, check);
      problem = check.failure();
    } catch (const malformed& e) {
      problem = std::string("malformed case: ") + e.what();
    } catch (const std::exception& e) {
      problem = std::string("exception: ") + e.what();
    }
    const std::string reason = check.skipped();
    if (!problem.empty()) {
      ++t.failed;
      if (failure.empty()) failure = c.name() + ": " + problem;
    } else if (!reason.empty()) {
      ++t.skipped;
      add(reasons, reason);
    } else {
      ++t.passed;
    }
  }
  add(t.note, failure);
  add(t.note, reasons);
  return t;
}

int run(const std::vector<std::string>& arguments, std::FILE* out, std::FILE* err) {
  std::string dir, wanted;
  const auto wrong = [&](const std::string& text) {
    std::fprintf(err, "talpa_golden: %s\n\n%s", text.c_str(), usage);
    return 2;
  };
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& flag = arguments[i];
    if (flag == "--help") {
      std::fputs(usage, out);
      return 0;
    }
    if (flag != "--dir" && flag != "--method") return wrong("unknown argument '" + flag + "'");
    if (i + 1 == arguments.size()) return wrong(flag + " needs a value");
    std::string& value = flag == "--dir" ? dir : wanted;
    if (!value.empty()) return wrong(flag + " comes twice");
    value = arguments[++i];
    if (value.empty()) return wrong(flag + " needs a value");
  }
  if (dir.empty()) return wrong("--dir is missing");
  if (!std::filesystem::is_directory(dir)) return wrong("'" + dir + "' is no folder");
  std::vector<std::filesystem::path> files = files_of(dir);
  if (files.empty()) return wrong("'" + dir + "' has no routers/*.json and no perft/*.json");
  if (!wanted.empty()) {
    const auto other = [&](const std::filesystem::path& f) {
      return f.stem().string() != wanted && name_of(f) != wanted;
    };
    files.erase(std::remove_if(files.begin(), files.end(), other), files.end());
    if (files.empty()) return wrong("'" + dir + "' has no file for the method '" + wanted + "'");
  }
  tally all;
  for (const auto& file : files) {
    const tally t = run_file(file);
    all.passed += t.passed;
    all.failed += t.failed;
    all.skipped += t.skipped;
    std::fprintf(out, "%s: %s%s%s%s\n", name_of(file).c_str(), counts(t).c_str(),
                 t.note.empty() ? "" : " (", t.note.c_str(), t.note.empty() ? "" : ")");
  }
  std::fprintf(out, "%s\n", counts(all).c_str());
  return all.failed == 0 ? 0 : 1;
}

}  // namespace talpa::golden
