// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "interrupt.hpp"
#include "text.hpp"

#include <talpa/core/error.hpp>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <unistd.h>
#include <utility>

namespace talpa::examples {

/// A file that appears under its name only when it is complete: it is written under a temporary
/// name in the same folder, and `commit` renames it. Without `commit` nothing is left, and what had
/// that name before stays as it was. A symbolic link is followed, so it stays a link.
///
/// The constructor already fails when the folder does not exist or cannot be written, or when the
/// name belongs to something that is not a regular file, so a long run can find out first. Every
/// failure is an io_error that begins with `talpa::examples::atomic_file: 'path'`.
class atomic_file {
 public:
  explicit atomic_file(const std::string& path) : path_(path) {
    namespace fs = std::filesystem;
    std::error_code code;
    fs::path target = path;
    const fs::file_status status = fs::status(target, code);
    if (status.type() == fs::file_type::directory) {
      fail("is a folder", "a file name = where to write");
    }
    if (fs::exists(status) && !fs::is_regular_file(status)) {
      fail("is a device, a pipe or a socket", "a regular file = it is replaced as a whole");
    }
    if (fs::is_symlink(fs::symlink_status(target, code))) {
      target = fs::weakly_canonical(target, code);
      if (code) fail("is unwritable (" + code.message() + ")", "a file name = where to write");
    }
    // rename would replace a file that its owner has protected.
    if (fs::exists(status) && ::access(target.c_str(), W_OK) != 0) fail_errno();
    target_ = target.string();
    const std::string stem =
        "." + target.filename().string() + ".tmp-" + std::to_string(::getpid());
    const detail::hold_signals hold;
    int descriptor = -1;
    // A name may be taken by what a killed process with the same number left behind.
    for (int attempt = 0; descriptor < 0 && attempt < 16; ++attempt) {
      temporary_ = (target.parent_path() / (stem + "-" + std::to_string(attempt))).string();
      descriptor = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor < 0 && errno != EEXIST) break;
    }
    if (descriptor < 0) fail_errno();
    file_ = ::fdopen(descriptor, "wb");
    slot_ = detail::tidy.add_temporary(temporary_.c_str());
    if (file_ == nullptr || slot_ == detail::tidy_state::capacity) {
      const int reason = file_ == nullptr ? errno : EMFILE;
      if (file_ == nullptr) {
        ::close(descriptor);
      } else {
        std::fclose(std::exchange(file_, nullptr));
      }
      ::unlink(temporary_.c_str());
      forget();
      errno = reason;
      fail_errno();
    }
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;
  ~atomic_file() { discard(); }

  const std::string& path() const { return path_; }

  /// Appends `text`. After a failure the file is gone.
  void write(std::string_view text) {
    if (file_ == nullptr) fail("is closed", "an open file = before commit");
    if (std::fwrite(text.data(), 1, text.size(), file_) != text.size()) fail_write();
  }

  /// Hands what is written so far to the operating system.
  void flush() {
    if (file_ != nullptr && std::fflush(file_) != 0) fail_write();
  }

  /// Makes the file appear, complete and on disk.
  void commit() {
    if (file_ == nullptr) fail("is closed", "an open file = one commit");
    if (std::fflush(file_) != 0 || ::fsync(::fileno(file_)) != 0) fail_write();
    std::FILE* file = std::exchange(file_, nullptr);
    if (std::fclose(file) != 0 || std::rename(temporary_.c_str(), target_.c_str()) != 0) {
      const int reason = errno;
      ::unlink(temporary_.c_str());
      forget();
      errno = reason;
      fail_errno();
    }
    forget();
  }

 private:
  [[noreturn]] void fail(const std::string& found, const char* expected) const {
    throw io_error("talpa::examples::atomic_file: '" + printable(path_) + "' " + found +
                   ", expected " + expected);
  }
  [[noreturn]] void fail_errno() const {
    fail(std::string("is unwritable (") + std::strerror(errno) + ")",
         "a file name = in a folder that can be written");
  }
  [[noreturn]] void fail_write() {
    const int reason = errno;
    discard();
    errno = reason;
    fail_errno();
  }
  void discard() noexcept {
    if (file_ == nullptr) return;
    std::fclose(std::exchange(file_, nullptr));
    ::unlink(temporary_.c_str());
    forget();
  }

  void forget() noexcept {
    if (slot_ < detail::tidy_state::capacity) detail::tidy.remove_temporary(slot_);
  }

  std::string path_;
  std::string target_;
  std::string temporary_;
  std::size_t slot_ = 0;
  std::FILE* file_ = nullptr;
};

}  // namespace talpa::examples
