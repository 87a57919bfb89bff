# The shipped policies, which speak of the mount kaizala and the tenant acme, for
# another mount and other tenants; named as configure.sh names them.

terraform {
  required_version = ">= 1.10"
}

variable "mount" {
  type = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", var.mount))
    error_message = "mount has to be a path such as teams/kaizala, of letters, digits and _, and inside also . and -."
  }
}

variable "tenants" {
  type = set(string)

  validation {
    condition = alltrue([
      for tenant in var.tenants :
      can(regex("^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$", tenant)) && !strcontains(tenant, "..")
    ])
    error_message = "A name of tenants cannot be a tenant's name."
  }

  # Vault ignores case in the names of policies, and the policy of all apps is called app-templated.
  validation {
    condition     = length(distinct(concat(["templated"], [for tenant in var.tenants : lower(tenant)]))) == length(var.tenants) + 1
    error_message = "Two policies would have one name: names of tenants may not differ in case alone, and none may be templated."
  }
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
