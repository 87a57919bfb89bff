# The shipped policies, which speak of the mount kaizala and the tenant acme, for
# another mount and other tenants; named as configure.sh names them.

terraform {
  required_version = ">= 1.10"
}

variable "mount" {
  type = string
}

variable "tenants" {
  type = set(string)
}

locals {
  prefix = replace(var.mount, "/", "-")

  policies = merge(
    {
      for name in ["connector-owner", "operator", "monitor", "app-templated"] :
      "${local.prefix}-${name}" => { file = name, tenant = "acme" }
    },
    [
      for tenant in var.tenants : {
        for name in ["tenant-user", "tenant-connect", "app", "sidecar"] :
        "${local.prefix}-${name}-${tenant}" => { file = name, tenant = tenant }
      }
    ]...
  )
}

output "prefix" {
  value = local.prefix
}

# replace takes what stands between slashes for a regular expression. @ stands for the tenant while the mount's name is
# put in: each name may contain kaizala or acme.
output "policies" {
  value = {
    for name, policy in local.policies :
    name => replace(replace(replace(
      file("${path.module}/../../policies/${policy.file}.hcl"),
      "/\\/acme([\"\\/])/", "/@$1"),
      "kaizala/", "${var.mount}/"),
    "/\\/@([\"\\/])/", "/${policy.tenant}$1")
  }
}
