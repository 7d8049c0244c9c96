// Runs the CPU kernels on problems from stdin: of another processor, emulated, where no torch is. See test_arm.py, which
// says what is read and written.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/stored.h"

namespace {

struct Header {
  char loss[32];
  int32_t student_type, teacher_type, class_strided, has_target, params, unused;
  int64_t rows, classes;
};

bool read(void* to, size_t bytes) { return bytes == 0 || fread(to, bytes, 1, stdin) == 1; }
void write(const std::vector<char>& from) { fwrite(from.data(), 1, from.size(), stdout); }

}  // namespace

int main() {
  const kd::Kernels& build = *kd::best_kernels();
  Header header;
  while (read(&header, sizeof header)) {
    kd::Problem p;
    int number = 0;
    while (number < build.loss_count && strcmp(build.losses[number].name, header.loss) != 0) ++number;
    if (number == build.loss_count || build.losses[number].params != header.params) return 1;
    const kd::LossFacts& facts = build.losses[number];
    p.outer = 1;
    p.inner = header.rows;
    p.classes = header.classes;
    const int64_t logits = header.rows * header.classes;
    const auto tensor = [&](int32_t type, std::vector<char>& memory) {
      const auto dtype = static_cast<kd::DType>(type);
      memory.resize(logits * kd::bytes_of(dtype));
      kd::Logits x = {memory.data(), dtype, 0, header.classes, 1};
      if (header.class_strided) x.inner_stride = 1, x.class_stride = header.rows;
      return x;
    };
    std::vector<char> student, teacher, gradient;
    std::vector<double> params(header.params);
    std::vector<int64_t> target(header.rows);
    p.student = tensor(header.student_type, student);
    if (facts.teacher) p.teacher = tensor(header.teacher_type, teacher);
    const size_t of_number = p.in_double() ? sizeof(double) : sizeof(float);
    std::vector<char> upstream(facts.outputs * header.rows * of_number);
    if (!read(params.data(), sizeof(double) * params.size()) || !read(student.data(), student.size()) ||
        !read(teacher.data(), teacher.size()) || !read(upstream.data(), upstream.size()) ||
        (header.has_target && !read(target.data(), sizeof(int64_t) * target.size())))
      return 1;
    p.set_loss(number, facts, params.data());
    p.ignore_index = -100;
    if (header.has_target) p.target = target.data();

    std::vector<char> rows(upstream.size());
    std::vector<double> stats(header.rows * kd::kStatsWidth), scaled(header.rows);
    p.rows = rows.data();
    p.stats = stats.data();
    if (!build.run(p, kd::plan(build, p), 0, header.rows)) return 1;
    write(rows);
    p.rows = nullptr;
    p.grad_rows = upstream.data();
    p.grad = tensor(header.student_type, gradient);
    p.pass = kd::Pass::backward;
    if (!build.run(p, kd::plan(build, p), 0, header.rows)) return 1;
    write(gradient);
    if (facts.outputs > 1) continue;
    p.pass = kd::Pass::forward_grad;
    p.stats = nullptr;
    p.scaled_rows = scaled.data();
    if (!build.run(p, kd::plan(build, p), 0, header.rows)) return 1;
    write({reinterpret_cast<char*>(scaled.data()), reinterpret_cast<char*>(scaled.data() + header.rows)});
    write(gradient);
  }
  return 0;
}
